"""Forwards of two GPUs of one host that write into each other's memory, against the same forwards with NCCL."""

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.ranks.window_ranks import work

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_forwards_through_windows_have_the_bits_of_those_with_nccl(tmp_path):
    multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=2)
