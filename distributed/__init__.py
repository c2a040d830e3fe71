"""Decoding with HunyuanVideo-1.5's VAE on a persistent group of ranks. Requires torch; does not require ComfyUI."""

from .errors import Cancelled, GroupError, JobError
from .group import RankGroup

__all__ = ["Cancelled", "GroupError", "JobError", "RankGroup"]
