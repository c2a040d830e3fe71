"""Small checkpoints of the VAE, as state dicts and files."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo15
from safetensors.torch import save_file
from torch import Tensor

from distributed.vae.hunyuanvideo15.layout import to_core

WIDTHS = (8, 16, 32, 64, 64)

HOSTILE = "\x1b]0;owned\x07\n\r\u202e" + "x" * 3_000_000
"""A string with terminal escapes, line breaks, a right-to-left override and 3 MB of text."""


def make_model() -> AutoencoderKLHunyuanVideo15:
    """Return diffusers' model with small widths and the same random weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKLHunyuanVideo15(block_out_channels=WIDTHS)


def in_core_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {to_core(key): tensor for key, tensor in weights.items()}


def decoder_of(weights: dict[str, Tensor], prefix: str = "decoder.") -> dict[str, Tensor]:
    """Return the decoder's tensors of weights in diffusers' layout, with `prefix` removed from their names."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith("decoder.")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


def assert_harmless(error: Exception) -> None:
    """Assert that the message is one short line without control characters."""
    assert str(error).isprintable() and len(str(error)) < 1000
