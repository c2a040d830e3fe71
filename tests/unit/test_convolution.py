"""Convolutions in pieces, against those in one."""

import pytest
import torch
import torch.nn.functional as F

from distributed import convolution


def draw(device: str, frames: int, channels: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shapes = (frames, channels, 7, 9), (out, channels, 3, 3)
    return tuple(torch.randn(shape).to(device, memory_format=torch.channels_last) for shape in shapes)


@pytest.mark.parametrize("some_channels", [8, 4, 3])
@pytest.mark.parametrize("some_frames", [5, 3, 1])
def test_pieces_make_up_the_whole(some_frames, some_channels):
    frames, taps = draw("cpu", 5, 16, 8)
    pieces = convolution.in_pieces(frames, taps, some_frames, some_channels)
    torch.testing.assert_close(pieces, F.conv2d(frames, taps))
    assert pieces.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize(("out", "fastest"), [(16, (3, 8)), (16, (5, 4)), (8, (5, 8))])
def test_the_fastest_pieces_are_taken_and_sought_once(out, fastest, monkeypatch):
    """Whatever the clock says, the convolution is the same, and it is asked once for a shape."""
    monkeypatch.setattr(convolution, "MANY", 4)
    monkeypatch.setattr(convolution, "TOO_MANY", 8)
    monkeypatch.setattr(convolution, "_fastest", {})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    timed = []

    def clock(frames, taps, pieces):
        timed.append(pieces)
        return 1.0 if pieces == fastest else 2.0

    monkeypatch.setattr(convolution, "_milliseconds", clock)
    frames, taps = draw("cuda", 5, 16, out)
    for _ in range(2):
        torch.testing.assert_close(convolution.conv2d(frames, taps), F.conv2d(frames, taps), atol=1e-4, rtol=1e-4)
    assert sorted(timed) == [(3, 4), (3, 8), (5, 4), (5, 8)]
    assert list(convolution._fastest.values()) == [fastest]


def test_pieces_must_gain_enough(monkeypatch):
    monkeypatch.setattr(convolution, "_milliseconds", lambda frames, taps, pieces: 2.0 if pieces[0] == 6 else 1.7)
    frames, taps = torch.empty(6, 4, 7, 9), torch.empty(2048, 4, 3, 3)
    assert convolution._choose(frames, taps) == (6, 2048)
