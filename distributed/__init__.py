"""HunyuanVideo-1.5's VAE decoder and transformer on a persistent group of ranks. Needs torch, but not ComfyUI."""

from .errors import Cancelled, GroupError, JobError
from .group import RankGroup

__all__ = ["Cancelled", "GroupError", "JobError", "RankGroup"]
