"""What a rank says about a decode before it runs it."""

import torch
from safetensors.torch import save_file

from benchmarks.random_weights import TINY, decoder_tensors
from distributed.ranks.task import JobWatch
from distributed.vae.job import DecodeJob, WeightSource
from distributed.vae.task import DecodeTask

CPU = torch.device("cpu")


def least(task: DecodeTask, fields: dict) -> int:
    """Return the least free memory in bytes with which a job fits."""
    low, high = 0, 2**40
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if task.fits(fields, middle) else (middle + 1, high)
    return low


def test_what_a_decode_and_a_preload_need_is_known_before_weights_are_loaded(tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file({f"decoder.{name}": tensor for name, tensor in decoder_tensors(TINY, CPU).items()}, path)
    source, task = WeightSource.find(path), DecodeTask(CPU)
    small, large = (DecodeJob.make(torch.zeros(1, 32, 5, size, size), source) for size in (8, 40))
    decodes = [job.fields | {"dtype": "float32"} for job in (small, large)]
    preload = dict(source.load([]).fields) | {"dtype": "float32"}
    before = [least(task, fields) for fields in (preload, *decodes)]
    assert before == sorted(before)
    task.load(decodes[0], {}, JobWatch())
    held = task.engine.weights.nbytes
    assert [least(task, fields) for fields in (preload, *decodes)] == [max(0, size - held) for size in before]
    assert before[0] == held
    assert task.fits(preload | {"host_only": ["cpu"]}, 0)
    limited = large.limited(2**20).fields | {"dtype": "float32"}
    assert task.fits(limited, 2**20)
