"""A small world of moving shapes, rendered with captions: the miniature's training data, and what it is measured on.

A clip shows one vivid shape in front of a dark background. All channels of a background stay below 0.42, and the
brightest channel of a shape is above 0.8, so that brightness alone separates them (`measure.py`). Everything follows
from the fields of `Clip`. Sizes and positions are relative to the picture: a clip can be rendered at any size.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS = {
    "red": (0.92, 0.10, 0.08),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.82, 0.20),
    "blue": (0.12, 0.30, 0.95),
    "pink": (0.95, 0.25, 0.80),
    "white": (0.95, 0.95, 0.95),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
"""Direction of each motion in x and y. y points down."""
BACKGROUNDS = ("night sky", "brick wall", "wooden floor", "dark sea", "grey road")
LETTERS = "ACEHKLOTXZ"
GLYPH_ROWS = {
    "A": "01110 10001 11111 10001 10001",
    "C": "01111 10000 10000 10000 01111",
    "E": "11111 10000 11110 10000 11111",
    "H": "10001 10001 11111 10001 10001",
    "K": "10010 10100 11000 10100 10010",
    "L": "10000 10000 10000 10000 11111",
    "O": "01110 10001 10001 10001 01110",
    "T": "11111 00100 00100 00100 00100",
    "X": "10001 01010 00100 01010 10001",
    "Z": "11111 00010 00100 01000 11111",
}
"""Each letter as 5 rows of 5 pixels, so that no font is needed."""
LETTER_GREY = 0.42

VERBS = {name: (f"moves {name}", f"moving {name}", f"goes {name}") for name in MOTIONS} | {
    "still": ("stands still", "standing still", "does not move")
}
TEMPLATES = (
    "a {colour} {shape} {verb} in front of a {background}",
    "A {colour} {shape} {verb} in front of a {background}.",
    "a {background} and a {colour} {shape} {verb}",
    "a {colour} {shape} {verb}",
)
LETTER_TEMPLATE = '{caption} with the letter "{letter}"'


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.84


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.75, x.abs() * math.cos(math.pi / 6) - (y + 1) * math.sin(math.pi / 6))


def star(x: Tensor, y: Tensor) -> Tensor:
    fifth = math.pi / 5
    angle = (torch.atan2(x, -y) + fifth).remainder(2 * fifth) - fifth
    radius = torch.hypot(x, y)
    along, across = radius * angle.cos() - 1.08, radius * angle.sin().abs()
    dx, dy = 0.46 * math.cos(fifth) - 1.08, 0.46 * math.sin(fifth)
    return (along * -dy + across * dx) * -1 / math.hypot(dx, dy)


def cross(x: Tensor, y: Tensor) -> Tensor:
    arm = torch.maximum(x.abs() - 1, y.abs() - 0.32)
    return torch.minimum(arm, torch.maximum(x.abs() - 0.32, y.abs() - 1))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
}
"""Signed distance to the outline of each shape, in its own radius: negative inside."""


@dataclass(frozen=True)
class Clip:
    """One clip of the world. size: the shape's diameter, divided by the picture's shorter side."""

    shape: str
    colour: str
    motion: str
    background: str = "grey road"
    letter: str = ""
    size: float = 0.5
    travel: float = 0.6
    """Distance of the motion, as a fraction of the space that the picture leaves for it."""
    offset: tuple[float, float] = (0.5, 0.5)
    """Place of the path in the space that is left, 0 to 1, in x and y."""
    phase: float = 0.0
    """Shifts the pattern of the background, 0 to 1."""
    wording: int = 0
    """Selects one of the caption's forms."""

    @property
    def held_out(self) -> bool:
        return is_held_out(self.shape, self.colour, self.motion)

    @property
    def caption(self) -> str:
        verbs = VERBS[self.motion]
        fields = {"colour": self.colour, "shape": self.shape, "background": self.background}
        template = TEMPLATES[self.wording % len(TEMPLATES)]
        caption = template.format(verb=verbs[self.wording // len(TEMPLATES) % len(verbs)], **fields)
        return LETTER_TEMPLATE.format(caption=caption, letter=self.letter) if self.letter else caption


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Return whether the combination is kept out of training: one in five. Each pair of its parts is in training."""
    return (list(SHAPES).index(shape) + list(COLOURS).index(colour) + list(MOTIONS).index(motion)) % 5 == 0


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """Return all triples of shape, colour and motion that are, or are not, held out."""
    triples = [(shape, colour, motion) for shape in SHAPES for colour in COLOURS for motion in MOTIONS]
    return [triple for triple in triples if is_held_out(*triple) == held_out]


TRAINED = combinations(held_out=False)


def draw(source: random.Random, anywhere: bool = True) -> Clip:
    """Return a random clip whose combination is not held out.

    anywhere: the size, the place and the distance of the motion are random. Otherwise the caption determines them. Of 8
    denoising steps only the first few can decide them, in which the noise hides all else: with places all over the
    picture, a small transformer that was given only the caption drew two shapes or a smear.
    """
    shape, colour, motion = source.choice(TRAINED)
    size, travel, offset = 0.5, 0.75, (0.5, 0.5)
    if anywhere:
        size, travel = source.uniform(0.4, 0.56), source.uniform(0.6, 0.9)
        offset = source.uniform(0.2, 0.8), source.uniform(0.2, 0.8)
    return Clip(
        shape,
        colour,
        motion,
        background=source.choice(BACKGROUNDS),
        letter=source.choice(LETTERS) if source.random() < 0.15 else "",
        size=size,
        travel=travel,
        offset=offset,
        phase=source.random(),
        wording=source.randrange(len(TEMPLATES) * 3),
    )


def render(clip: Clip, frames: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the clip as [3, frames, height, width], float32, 0 to 1."""
    pixels = _grid(height, width, device)
    time = torch.linspace(-0.5, 0.5, frames, device=device)
    picture = _background(clip, *pixels, time, height)
    if clip.letter:
        ink = letter_mask(clip.letter, height, width, device)
        picture = picture + (LETTER_GREY - picture) * ink
    ink = coverage(clip, frames, height, width, device)
    return picture + (_tone(COLOURS[clip.colour], device) - picture) * ink


def coverage(clip: Clip, frames: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the part of each pixel that the shape covers, [frames, height, width]."""
    y, x = _grid(height, width, device)
    radius = clip.size * min(height, width) / 2
    time = torch.linspace(-0.5, 0.5, frames, device=device)[:, None, None]
    centres = []
    for length, direction, place in zip((width, height), MOTIONS[clip.motion], clip.offset, strict=True):
        space = length - 2.3 * radius
        path = space * clip.travel * direction
        centres.append(length / 2 + (place - 0.5) * (space - abs(path)) + path * time)
    return (0.5 - SHAPES[clip.shape]((x - centres[0]) / radius, (y - centres[1]) / radius) * radius).clamp(0, 1)


def letter_mask(letter: str, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the part of each pixel that the letter in the upper left corner covers, [height, width]."""
    side, margin = round(0.3 * min(height, width)), round(0.04 * min(height, width))
    drawn = F.interpolate(_rows(letter, device), size=(side, side), mode="nearest")[0, 0]
    return F.pad(drawn, (margin, width - side - margin, margin, height - side - margin))


@cache
def _rows(letter: str, device: torch.device | str) -> Tensor:
    """Return the letter's pixels, [1, 1, 5, 5]. They are kept for the same reason as `_tone`."""
    return torch.tensor([[[[float(cell) for cell in row] for row in GLYPH_ROWS[letter].split()]]], device=device)


def _grid(height: int, width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return the pixels' centres: y [height, 1] and x [1, width]."""
    y = torch.arange(height, device=device, dtype=torch.float32)[:, None] + 0.5
    return y, torch.arange(width, device=device, dtype=torch.float32)[None] + 0.5


def _background(clip: Clip, y: Tensor, x: Tensor, time: Tensor, height: int) -> Tensor:
    """Return the background, [3, frames or 1, height, width]. Its patterns scale with the height."""
    x, y, turn = x / height + clip.phase, y / height, 2 * math.pi * clip.phase
    match clip.background:
        case "night sky":
            stars = (torch.sin(37 * x + turn) * torch.sin(41 * y + 3 * torch.sin(9 * x))).clamp(min=0) ** 12
            tone, light = (0.04, 0.05, 0.14), 0.26 * stars[None]
        case "brick wall":
            row = (y * 8).floor()
            joint = torch.minimum(_edge(y * 8), _edge(x * 4 + 0.5 * row.remainder(2)) * 2)
            tone, light = (0.34, 0.14, 0.10), (-0.10 * (1 - (joint * 8).clamp(0, 1)))[None]
        case "wooden floor":
            grain = torch.sin(60 * y + 4 * torch.sin(5 * x + turn))
            tone, light = (0.32, 0.20, 0.12), (0.03 * grain - 0.08 * (1 - (_edge(y * 5) * 12).clamp(0, 1)))[None]
        case "dark sea":
            waves = torch.sin(34 * y + 2 * torch.sin(8 * x + turn) + 6 * time[:, None, None])
            tone, light = (0.07, 0.19, 0.27), 0.06 * waves
        case _:
            tone, light = (0.24, 0.24, 0.25), (0.05 * (y - 0.5) + 0 * x)[None]
    return _tone(tone, x.device) + light.expand(-1, y.shape[0], x.shape[1])


@cache
def _tone(tone: tuple[float, float, float], device: torch.device | str) -> Tensor:
    """Return a colour as [3, 1, 1, 1]. It is kept, because a copy to a GPU waits until the GPU has ended its work."""
    return torch.tensor(tone, device=device)[:, None, None, None]


def _edge(value: Tensor) -> Tensor:
    """Return the distance to the nearest whole number."""
    return (value - value.round()).abs()
