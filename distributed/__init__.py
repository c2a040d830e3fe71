"""HunyuanVideo-1.5's VAE decode on a persistent group of ranks. Needs torch, and nothing of ComfyUI."""

from .errors import Cancelled, GroupError, JobError
from .group import RankGroup

__all__ = ["Cancelled", "GroupError", "JobError", "RankGroup"]
