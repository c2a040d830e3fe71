"""Convolutions in pieces, compared with one call."""

import pytest
import torch
import torch.nn.functional as F

from distributed.ops import convolution


@pytest.mark.parametrize("pieces", [(5, 8), (3, 8), (5, 4), (3, 3), (1, 1)])
def test_a_convolution_in_pieces_equals_one_call(pieces, monkeypatch):
    monkeypatch.setattr(convolution, "pieces", lambda *shape: pieces)
    monkeypatch.setattr(convolution, "is_measured", lambda device: True)
    torch.manual_seed(0)
    shapes = (5, 16, 7, 9), (8, 16, 3, 3)
    frames, taps = (torch.randn(shape).to(memory_format=torch.channels_last) for shape in shapes)
    given = convolution.conv2d(frames, taps)
    torch.testing.assert_close(given, F.conv2d(frames, taps))
    assert given.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("device", "capability", "hip", "measured"),
    [
        ("cpu", (9, 0), None, False),
        ("meta", (9, 0), None, False),
        ("cuda", (9, 0), None, True),
        ("cuda", (8, 0), None, False),
        ("cuda", (10, 0), None, False),
        ("cuda", (9, 0), "7.0", False),
    ],
)
def test_slow_shapes_are_split_only_on_the_gpus_they_were_measured_on(device, capability, hip, measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    convolution.is_measured.cache_clear()
    assert convolution.is_measured(torch.device(device)) is measured
    convolution.is_measured.cache_clear()


def test_a_cpu_convolves_a_slow_shape_in_one_call(monkeypatch):
    def fail(*shape):
        raise AssertionError("the convolution was split")

    monkeypatch.setattr(convolution, "pieces", fail)
    frames, taps = torch.randn(14, 1, 34, 92), torch.randn(1024, 1, 3, 3)
    assert torch.equal(convolution.conv2d(frames, taps), F.conv2d(frames, taps))


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        ((4, 90, 160, 1024), (4, 1024)),
        ((4, 90, 160, 4096), (4, 4096)),
        ((2, 45, 80, 8192), (2, 1024)),  # more than 4096 output channels are always split
        ((1, 68, 120, 4096), (1, 1024)),  # 8160 positions are in FEW
        ((1, 68, 120, 1024), (1, 1024)),
        ((14, 32, 90, 1024), (7, 1024)),  # 40320 positions are in MIDDLE, and 32 rows are at most LOW
        ((15, 30, 90, 8192), (8, 1024)),
        ((14, 90, 32, 1024), (14, 1024)),
        ((14, 32, 90, 512), (14, 512)),
    ],
)
def test_shapes_that_are_slow_in_cudnn_are_split(shape, pieces):
    assert convolution.pieces(*shape) == pieces


def test_no_piece_has_a_slow_shape():
    for n in range(1, 17):
        for height, width in ((13, 160), (25, 90), (32, 90), (41, 320), (45, 80), (53, 30), (68, 120)):
            for channels in (1024, 2048, 4096, 8192):
                some, out = convolution.pieces(n, height, width, channels)
                for left in {some, n - some or some}:
                    assert convolution.pieces(left, height, width, out) == (left, out)
