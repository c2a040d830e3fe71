"""Attention: accuracy, the order of kernels on each device, and no change of global settings."""

import sys
import types

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from distributed.denoise import attention
from distributed.ranks.devices import Device

FAST = {(9, 0): SDPBackend.CUDNN_ATTENTION, (10, 0): SDPBackend.CUDNN_ATTENTION, (12, 0): SDPBackend.CUDNN_ATTENTION}
FAST |= {capability: SDPBackend.FLASH_ATTENTION for capability in ((7, 5), (8, 0), (8, 6), (8, 9))}


def draw(*shape: int) -> list[Tensor]:
    return list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention in float64. All tensors are [S, heads, dim]."""
    query, key, value = (x.double().transpose(0, 1) for x in (query, key, value))
    weights = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1)
    return (weights @ value).transpose(0, 1)


@pytest.mark.parametrize("shape", [(1, 1, 8), (37, 3, 16), (130, 5, 24)], ids=str)
def test_every_token_attends_to_all_tokens(shape):
    query, key, value = draw(*shape)
    torch.testing.assert_close(attention.attend(query, key, value), exact(query, key, value).float())


def test_a_rank_without_heads_returns_an_empty_result():
    assert attention.attend(*draw(6, 0, 16)).shape == (6, 0, 16)


@pytest.mark.parametrize("capability", FAST, ids=str)
def test_the_fastest_kernel_is_first_and_global_settings_are_restored(monkeypatch, capability):
    def settings() -> tuple:
        flags = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("cudnn", "flash", "math")]
        return *flags, torch._C._get_sdp_priority_order()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    before = settings()
    with attention._kernels(Device(torch.device("cuda"))):
        assert torch._C._get_sdp_priority_order()[0] == int(FAST[capability])
        assert torch.backends.cuda.cudnn_sdp_enabled() == (capability >= (9, 0))
        assert torch.backends.cuda.math_sdp_enabled()  # the fallback if no other kernel is supported
    assert settings() == before


def test_an_npu_uses_npu_fusion_attention(monkeypatch):
    calls = []

    def npu_fusion_attention(query, key, value, head_num, input_layout, *, scale=1.0):
        calls.append((tuple(query.shape), head_num, input_layout))
        return exact(query[0] * scale * query.shape[-1] ** 0.5, key[0], value[0])[None].float(), None

    module = types.ModuleType("torch_npu")
    module.npu_fusion_attention = npu_fusion_attention
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(Device, "has_npu_kernels", True)
    query, key, value = draw(11, 3, 16)
    result = attention.attend(query, key, value)
    assert calls == [((1, 11, 3, 16), 3, "BSND")]
    torch.testing.assert_close(result, exact(query, key, value).float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_on_a_gpu_is_accurate_for_its_dtype(dtype):
    query, key, value = (x.to("cuda", dtype) for x in draw(1000, 16, 128))
    reference, result = exact(query, key, value), attention.attend(query, key, value)
    assert (result - reference).norm() < {torch.float32: 1e-4}.get(dtype, 1e-2) * reference.norm()
