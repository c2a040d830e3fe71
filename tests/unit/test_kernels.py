"""The Triton kernels compared with their plain forms: compiled on a GPU, otherwise interpreted on the CPU."""

import importlib.util
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distributed.ops import kernels
from distributed.ops.winograd import Products
from distributed.vae.regions import Region

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHANNELS = (8, 128, 1024) if DEVICE.type == "cuda" else (24,)
HEIGHT, WIDTH = 5, 7
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Relative error. Triton's interpreter truncates to bfloat16 instead of rounding."""


@pytest.fixture(scope="module")
def fused():
    """Return the module of the Triton kernels."""
    from distributed.ops import triton_kernels

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            from triton.runtime import interpreter

            def patch_tensors(tensor, scope, original=interpreter._patch_lang_tensor):
                original(tensor, scope)
                # Triton 3.6 converts an array with one element to an index, which NumPy 2.4 rejects.
                scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

            patch.setattr(interpreter, "_patch_lang_tensor", patch_tensors)
        yield triton_kernels


@pytest.fixture
def both(fused, monkeypatch, dtype):
    """Return a function that compares the results of a call with the fused and with the plain form."""

    def compare(call: Callable[..., tuple[Tensor, ...]], *arguments: object) -> None:
        results = []
        monkeypatch.setattr(kernels, "STRIP", 1)  # one row per strip
        for module in (fused, None):
            monkeypatch.setattr(kernels, "_kernels", lambda x, module=module: module)
            results.append(call(*arguments))
        for ours, plain in zip(*results, strict=True):
            assert ours.shape == plain.shape and (ours.isfinite() == plain.isfinite()).all()
            error = (ours.float() - plain.float()).norm() / plain.float().norm().clamp_min(1e-6)
            assert error < TOLERANCE[dtype]

    return compare


@pytest.fixture
def draw(dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return lambda *shape, dtype=dtype: torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def draw_products(draw, n: int, channels: int, m: int) -> Products:
    """Draw the products of n frames in groups of m."""
    groups, first_frame = divmod(n, m)
    parts = tuple(draw(groups, HEIGHT, WIDTH, channels) for _ in range(m + 2))
    return Products(parts, draw(1, HEIGHT, WIDTH, channels) if first_frame else None)


DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32, torch.bfloat16]
"""Fewer on the CPU, because the interpreter is slow."""

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
]


LENGTHS = [(2, 1), (2, 2), (2, 3), (2, 4), (4, 1), (4, 4), (4, 5), (4, 8)]
"""m and the number of frames."""


WINDOWS = [((1, 1), (HEIGHT + 2, WIDTH + 2)), ((0, 2), (HEIGHT + 1, WIDTH + 2)), ((2, 0), (HEIGHT + 3, WIDTH))]
"""Corner of the frames in a window, and the size of the window."""


CASES = [(*length, *WINDOWS[0]) for length in LENGTHS] + [(4, 5, *window) for window in WINDOWS[1:]]
"""m, number of frames, corner and size. Corner and grouping are independent, so not all combinations are tested."""


def within(frames: torch.Tensor) -> torch.Tensor:
    """Return a copy of frames that is a view of a larger tensor."""
    n, height, width, channels = frames.shape
    larger = torch.full((n, height + 3, width + 5, channels), float("nan"), device=DEVICE, dtype=frames.dtype)
    larger[:, 2:-1, 1:-4] = frames
    return larger[:, 2:-1, 1:-4]


@pytest.mark.parametrize(("m", "n", "corner", "size"), CASES, ids=str)
def test_both_forms_fill_groups_alike(both, draw, dtype, m, n, corner, size):
    groups, first_frame = divmod(n, m)

    def fill(x, products, bias, gamma, first_chunk):
        value, kept = None if x is None else within(x), past.clone()
        shape = m + 2, groups + first_frame, *size, channels
        out = torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)
        kernels.fill_groups(value, products, kept, out, corner, first_chunk=first_chunk, bias=bias, gamma=gamma)
        written = kept, out[0, :first_frame], out[:, first_frame:]
        return written if x is None else (value, *written)

    for channels in CHANNELS:
        x, past = draw(n, HEIGHT, WIDTH, channels), draw(2, HEIGHT, WIDTH, channels)
        products, (bias, gamma) = draw_products(draw, n, channels, m), draw(2, channels, dtype=torch.float32)
        for norm, first_chunk in itertools.product((None, gamma), (True,) if first_frame else (True, False)):
            both(fill, x, None, None, norm, first_chunk)
            both(fill, None, products, bias, norm, first_chunk)
            both(fill, x, products, bias, norm, first_chunk)


@pytest.mark.parametrize(("m", "n", "corner", "size"), CASES, ids=str)
def test_both_forms_fill_the_last_window_alike(both, draw, dtype, m, n, corner, size):
    def fill(x, products, bias, gamma):
        out = torch.full((n, *size, channels), float("nan"), device=DEVICE, dtype=dtype)
        kernels.fill_window(within(x), products, out, corner, bias=bias, gamma=gamma)
        return (out,)

    for channels in CHANNELS:
        x, products = draw(n, HEIGHT, WIDTH, channels), draw_products(draw, n, channels, m)
        both(fill, x, products, *draw(2, channels, dtype=torch.float32))


@pytest.mark.parametrize(("m", "n"), LENGTHS)
@pytest.mark.parametrize(("temporal", "first"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("part", [Region(0, 2 * HEIGHT, 0, 2 * WIDTH), Region(1, 8, 3, 13)], ids=str)
def test_both_forms_upsample_alike(both, draw, m, n, temporal, first, part):
    def upsample(packed, bias, x):
        frames = n * (1 + temporal) - (temporal and first)
        out = within(x.new_zeros(frames, part.height, part.width, channels))
        corner = part.top, part.left
        kernels.upsample(packed, bias, within(x), out, corner, temporal=temporal, first=first)
        return (out,)

    for channels in CHANNELS:
        factor = (8 if temporal else 4) * channels
        bias, x = draw(factor, dtype=torch.float32), draw(n, HEIGHT, WIDTH, 2 * channels)
        both(upsample, draw_products(draw, n, factor, m), bias, x)


def test_both_forms_sum_taps_alike(both, draw):
    partial, bias = draw(3, HEIGHT + 2, WIDTH + 2, 96), draw(3, dtype=torch.float32)
    both(lambda: (kernels.sum_taps(partial, bias),))
