"""Sizes and shares of everything that is trained on.

Work, counted as multiplications and additions of convolutions, linear layers and attention:

| stage | forward | one step, forward and backward |
| --- | --- | --- |
| VAE | 51 kFLOP per pixel to encode, 87 to decode | 1.1 million pixels, 0.44 TFLOP |
| latents | 51 kFLOP per pixel | 9.6 billion pixels, once, 490 TFLOP |
| transformer | 2.9 MFLOP per token, 900 tokens per clip | 56,000 tokens, 0.49 TFLOP |

These layers are too narrow for a GPU's matrix units: memory and the start of kernels limit the speed. Measured on an
H200 on 2026-11-28 without CUDA graphs and compiled layers, with 86,000 tokens in the transformer's step:

| stage | one step | kernels of one step | steps | result |
| --- | --- | --- | --- | --- |
| VAE | 112 ms | 55 ms for 5 frames of 480x848, of which convolutions 25 ms | 4,479 in 504 s | 26.3 dB |
| latents | | | 58 s | |
| transformer | 62 ms | 34.5 ms, of which attention 11.2 ms | 5,835 in 362 s | loss 0.263, right prompts 1 % |

Half of a step's time went to the start of kernels, which `graphs.py` removes, and half of the kernels' time to
elementwise work, which is compiled now. A transformer trained at half of that run's rate of 1e-3 ended at a loss of
0.324, and the loss was still falling: hence the higher rate and the smaller batches.
"""

from dataclasses import dataclass, field

from .. import parts


@dataclass(frozen=True)
class Crops:
    """One size of clips that the VAE is trained on."""

    share: float
    """Part of the steps that have this size."""
    batch: int
    frames: int
    size: tuple[int, int]
    """Height and width."""


@dataclass(frozen=True)
class Shelf:
    """One size of clips that the transformer is trained on."""

    share: float
    batch: int
    worlds: int
    """Number of clips of the world. Those of the footage are all its windows."""
    frames: int
    size: tuple[int, int]
    """Height and width."""

    @property
    def anywhere(self) -> int:
        """Number of the first clips of the world, whose shapes can be anywhere (`world.draw`)."""
        return self.worlds * 3 // 10


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and from which seed."""

    seed: int = 1
    vae: dict = field(default_factory=lambda: dict(parts.VAE_CONFIG))
    transformer: dict = field(default_factory=lambda: dict(parts.TRANSFORMER_CONFIG))
    vae_rate: float = 5e-4
    transformer_rate: float = 2e-3
    footage_sizes: tuple[tuple[int, int], ...] = ((720, 1280), (480, 848), (240, 424), (160, 256))
    """Height and width of the copies of the footage from which crops are taken."""
    crops: tuple[Crops, ...] = (
        Crops(0.25, 2, 17, (128, 128)),
        Crops(0.15, 1, 9, (256, 256)),
        Crops(0.35, 1, 17, (160, 256)),
        Crops(0.20, 1, 5, (480, 848)),
        Crops(0.05, 1, 9, (480, 848)),
    )
    """A quarter of the steps has whole frames, because the attention sees the whole picture: 1590 positions per frame.
    Batches are small, so that there are many steps."""
    footage_in_vae: float = 0.5
    """Part of the VAE's clips that are of the footage."""
    shelves: tuple[Shelf, ...] = (
        Shelf(0.70, 64, 10_000, 17, (160, 256)),
        Shelf(0.20, 96, 3_000, 17, (128, 192)),
        Shelf(0.10, 32, 1_200, 33, (160, 256)),
    )
    """The first one has the size of the example prompts."""
    footage_in_transformer: float = 0.15
    images: float = 0.15
    """Part of the other clips of the transformer whose first frame is given, too (image-to-video)."""
    no_caption: float = 0.25
    """Part of the transformer's clips without a caption. Guidance multiplies the errors of these predictions, too."""
    shift: float = 7.0
    """Timestep shift of the noise levels in training. They are uniform before the shift. Latents have so many elements
    that what a clip shows is hidden only above a level of 0.8: with a shift of 3, at which two thirds are lower,
    colours and motions were learned, but no shapes."""
    guidance: float = 2.5
    """Guidance that gives the velocity of flow matching. With 6 a video then looks as with 6 / 2.5 = 2.4 otherwise."""
    most_steps: int | None = None
    judged_size: tuple[int, int] = (480, 848)
    """Height and width of the footage by which the VAE is judged."""
    judged_combinations: int | None = None
    """Number of combinations that the prompts and the pictures of the report show. None: all that were held out."""
    judged_seeds: int = 3
    steps: int = 8
    """Denoising steps of the report, which are those of the example prompts."""


CHECK = Recipe(
    vae={"block_out_channels": (8, 8, 16, 32, 64), "layers_per_block": 1},
    transformer=parts.TRANSFORMER_CONFIG | {"num_layers": 1},
    footage_sizes=((60, 96), (48, 80)),
    crops=(Crops(0.5, 2, 5, (32, 32)), Crops(0.5, 1, 5, (48, 80))),
    shelves=(Shelf(0.7, 4, 6, 9, (32, 48)), Shelf(0.3, 4, 3, 5, (48, 32))),
    most_steps=2,
    judged_size=(48, 80),
    judged_combinations=2,
    judged_seeds=1,
    steps=2,
)
"""Two steps of each stage with minute sizes, to see that all stages run on a machine."""
