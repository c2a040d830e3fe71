"""The fused passes: the Triton kernels and the plain forms, compared with float64."""

import importlib.util

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from distributed.denoise import fused
from distributed.denoise.parallel import parts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Relative error. Triton's interpreter truncates to bfloat16 instead of rounding."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(params=[pytest.param("triton", marks=needs_triton), "plain"])
def form(request, monkeypatch):
    """Make `fused` use the Triton kernels, interpreted if there is no GPU, or the plain forms."""
    kernels = None
    if request.param == "triton":
        from distributed.denoise import triton_kernels as kernels

        if DEVICE.type == "cpu":
            from triton.runtime import interpreter

            def patch_tensors(tensor, scope, original=interpreter._patch_lang_tensor):
                original(tensor, scope)
                # Triton 3.6 converts an array with one element to an index, which NumPy 2.4 rejects.
                scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

            monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensors)
    monkeypatch.setattr(fused, "_kernels", lambda x: kernels)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def expected(x: Tensor, weight: Tensor | None, rotation: fused.Rotation | None, ranks: int) -> Tensor:
    """Return the result of `place_heads` in float64, with diffusers' rotation."""
    x = x.double()
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    if rotation is not None:
        x = apply_rotary_emb(x[None], tuple(part.repeat_interleave(2, 1) for part in rotation), sequence_dim=1)[0]
    return torch.cat([part.flatten() for part in x.split(parts(x.shape[1], ranks), dim=1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "dim", "ranks"), [(4, 16, 1), (5, 16, 3), (3, 24, 2), (2, 8, 4), (16, 128, 3)])
@pytest.mark.parametrize(("norm", "rotated"), [(True, True), (True, False), (False, False)])
def test_heads_are_normed_rotated_and_ordered_by_destination_rank(form, dtype, heads, dim, ranks, norm, rotated):
    tokens = 5
    x, weight = draw(tokens, heads + 2, dim, dtype=dtype)[:, 1:-1], 1 + draw(dim, dtype=dtype)
    angles = draw(tokens, dim // 2)
    rotation = (angles.cos(), angles.sin()) if rotated else None
    out = torch.full((tokens * heads * dim,), float("nan"), dtype=dtype, device=DEVICE)
    fused.place_heads(x, out, weight=weight if norm else None, eps=1e-6, rotation=rotation, ranks=ranks)
    reference = expected(x, weight if norm else None, rotation, ranks)
    assert ((out - reference).norm() / reference.norm()) < TOLERANCE[dtype]


def test_with_one_rank_heads_can_be_placed_in_place(form):
    x, weight, angles = draw(6, 4, 16), 1 + draw(16), draw(6, 8)
    rotation = angles.cos(), angles.sin()
    reference = expected(x, weight, rotation, 1)
    fused.place_heads(x, x, weight=weight, eps=1e-6, rotation=rotation, ranks=1)
    torch.testing.assert_close(x.flatten(), reference.float())


def test_empty_inputs_are_accepted(form):
    for shape in ((0, 4, 16), (4, 0, 16)):
        fused.place_heads(draw(*shape), draw(0), weight=draw(16), eps=1e-6, rotation=None, ranks=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 32), (3, 24), (1, 2048), (0, 32)], ids=str)
def test_a_gated_addition_and_the_next_norm_equal_the_float64_reference(form, dtype, shape):
    x, update = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype).flip(-1)
    gate, shift, scale = draw(3, shape[1], dtype=dtype)
    total = x.double() + gate.double() * update.double()
    normed = torch.nn.functional.layer_norm(total, shape[1:], eps=1e-6) * scale.double() + shift.double()
    out = torch.full_like(x, float("nan"))
    fused.add_norm(x, gate, update, shift, scale, 1e-6, out)
    for ours, reference in ((x, total), (out, normed)):
        assert (ours - reference).norm() <= TOLERANCE[dtype] * reference.norm()
    assert torch.allclose(fused.modulated_norm(x, shift, scale, 1e-6).double(), normed, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_gelu_is_the_tanh_form(dtype):
    layer, x = torch.nn.Linear(32, 64).to(DEVICE, dtype), draw(9, 32, dtype=dtype)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        result = fused.linear_gelu(x, layer)
    reference = torch.nn.functional.gelu(exact, approximate="tanh")
    assert (result - reference).norm() < (1e-5 if dtype == torch.float32 else 5e-3) * reference.norm()
    assert (reference - torch.nn.functional.gelu(exact)).norm() > 1e-4 * reference.norm()  # the exact form differs
