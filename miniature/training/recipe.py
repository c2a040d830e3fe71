"""The training's settings, such as sizes and shares of the clips, and its measured cost.

Work, counted as multiplications and additions of convolutions, linear layers and attention:

| stage | forward | one step, forward and backward |
| --- | --- | --- |
| VAE | 51 kFLOP per pixel to encode, 87 to decode | 1.1 million pixels, 0.44 TFLOP |
| latents | 51 kFLOP per pixel | 9.6 billion pixels, once, 490 TFLOP |
| transformer | 2.9 MFLOP per token, 900 tokens per clip | 56,000 tokens, 0.49 TFLOP |

These layers are too narrow for a GPU's matrix units: memory bandwidth and kernel launches limit the speed. The files of
`miniature/weights`, measured on an H200 on 2026-11-28 (the decoder alone in a process of its own):

| stage | one step | steps and time | of this, compilation and the choice of algorithms | result |
| --- | --- | --- | --- | --- |
| VAE | 27 ms | 11,003 in 438 s | 130 s | 25.9 dB |
| decoder alone | 27 ms | 6,543 in 235 s | 55 s | 26.2 dB |
| latents | | 76 s | | |
| transformer | 20 ms | 16,531 in 398 s | 70 s | 97 % of the prompts right, 47 % with guidance 1 |
| report | | 62 s | | |

Without CUDA graphs and compiled layers, a step of the VAE took 112 ms. Kernel launches were half of it.

An earlier run had half the learning rate, batches of 96 clips, a shift of 3, shapes anywhere in the picture, and a VAE
whose latents held two of the colours badly. It ended with 63 % right colours, 78 % right motions and 1 % right shapes.
What each of the changes contributed was not measured.
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
class Bucket:
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
    decoder_alone: float = 0.3
    """Part of the VAE's time in which its decoder is trained alone."""
    decoder_crops: tuple[Crops, ...] = (
        Crops(0.40, 1, 17, (160, 256)),
        Crops(0.45, 1, 5, (480, 848)),
        Crops(0.15, 1, 9, (480, 848)),
    )
    """Sizes of the clips when the decoder is trained alone: whole pictures."""
    footage_in_decoder: float = 0.7
    """Part of the clips that are of the footage when the decoder is trained alone."""
    buckets: tuple[Bucket, ...] = (
        Bucket(0.70, 64, 10_000, 17, (160, 256)),
        Bucket(0.20, 96, 3_000, 17, (128, 192)),
        Bucket(0.10, 32, 1_200, 33, (160, 256)),
    )
    """The first one has the size of the example prompts."""
    footage_in_transformer: float = 0.15
    images: float = 0.15
    """Part of the other clips of the transformer whose first frame is given, too (image-to-video)."""
    no_caption: float = 0.25
    """Part of the transformer's clips without a caption. Guidance multiplies the errors of these predictions, too."""
    shift: float = 7.0
    """Timestep shift of the noise levels in training. They are uniform before the shift. Latents have so many elements
    that what a clip shows is hidden only above a level of 0.8. With a shift of 3, two thirds are lower."""
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
    decoder_crops=(Crops(1.0, 1, 5, (48, 80)),),
    buckets=(Bucket(0.7, 4, 6, 9, (32, 48)), Bucket(0.3, 4, 3, 5, (48, 32))),
    most_steps=2,
    judged_size=(48, 80),
    judged_combinations=2,
    judged_seeds=1,
    steps=2,
)
"""Two steps of each stage with minute sizes, to see that all stages run on a machine."""
