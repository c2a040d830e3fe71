"""The data set of the transformer: latents, captions and first frames of clips, encoded once and kept on the device."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideo15Pipeline
from torch import Tensor, nn

from .. import footage, text, world
from .forms import training_forms
from .recipe import Bucket

AT_ONCE = 8
"""Clips that are encoded in one batch."""
CAPTION_TOKENS, GLYPH_TOKENS = 64, 16
"""Tokens that captions and their quoted letters are padded to. The pipelines pad to 1000 and 256."""


@dataclass
class Library:
    """Embeddings of all captions, on the device. The first caption is empty."""

    numbers: dict[str, int]
    """Row of each caption."""
    texts: Tensor
    """[captions, tokens, width], float16."""
    text_masks: Tensor
    """Which tokens are valid, [captions, tokens]."""
    letters: list[str]
    """The quoted letter of each row of glyphs. The first row is that of captions without one."""
    glyphs: Tensor
    glyph_masks: Tensor


@dataclass
class EncodedBucket:
    """The encoded clips of one bucket: those of the world first, then those of the footage."""

    bucket: Bucket
    latents: Tensor
    """[clips, 32, t, h, w], float16, times the scaling factor."""
    captions: Tensor
    """Row of each clip's caption in the library."""
    letters: Tensor
    """Row of each clip's letter in the library."""
    images: Tensor
    """Embeddings of each clip's first frame, [clips, tokens, width], float16."""


@torch.no_grad()
def read(captions: list[str], encoders: dict, device: torch.device) -> Library:
    """Return the embeddings of captions as the pipelines make them."""
    captions = ["", *dict.fromkeys(captions)]
    encoder, quoted = encoders["text_encoder"], encoders["text_encoder_2"]
    parts = [
        HunyuanVideo15Pipeline._get_mllm_prompt_embeds(
            encoder, encoders["tokenizer"], captions[i : i + 256], device, tokenizer_max_length=CAPTION_TOKENS
        )
        for i in range(0, len(captions), 256)
    ]
    texts, masks = (torch.cat(column) for column in zip(*parts, strict=True))
    longest = int(masks.sum(1).max())
    if longest == CAPTION_TOKENS:
        raise ValueError(f"A caption has {longest} tokens or more. Increase CAPTION_TOKENS.")
    longest += -longest % 16  # attention kernels copy masks whose rows are not multiples of 16
    letters = ["", *world.LETTERS]
    glyphs, glyph_masks = HunyuanVideo15Pipeline._get_byt5_prompt_embeds(
        encoders["tokenizer_2"], quoted, [f'"{letter}"' if letter else "" for letter in letters], device, GLYPH_TOKENS
    )
    numbers = {caption: number for number, caption in enumerate(captions)}
    masks = masks[:, :longest].bool()
    return Library(numbers, texts[:, :longest].half(), masks, letters, glyphs.half(), glyph_masks.bool())


def clips_of(bucket: Bucket, seed: int) -> list[world.Clip]:
    """Return the clips of the world of one bucket."""
    source = random.Random(f"{seed} {bucket.frames} {bucket.size}")
    return [world.draw(source, anywhere=number < bucket.anywhere) for number in range(bucket.worlds)]


@torch.no_grad()
def encode(
    bucket: Bucket,
    clips: list[world.Clip],
    original: Tensor,
    vae: nn.Module,
    encoders: dict,
    library: Library,
) -> EncodedBucket:
    """Render and encode the clips of one bucket. original: the footage, uint8 [3, frames, height, width]."""
    device = next(vae.parameters()).device
    film = footage.resized(original.to(device), *bucket.size)
    windows = film.shape[1] - bucket.frames + 1
    captions = [clip.caption for clip in clips] + [footage.CAPTIONS[i % len(footage.CAPTIONS)] for i in range(windows)]
    letters = [clip.letter for clip in clips] + [""] * windows
    latents, images = [], []

    def pixels(number: int) -> Tensor:
        if number < len(clips):
            return world.render(clips[number], bucket.frames, *bucket.size, device) * 2 - 1
        first = number - len(clips)
        return film[:, first : first + bucket.frames].float() / 127.5 - 1

    with training_forms(), torch.autocast(device.type, torch.bfloat16):
        for begin in range(0, len(captions), AT_ONCE):
            batch = torch.stack([pixels(i) for i in range(begin, min(begin + AT_ONCE, len(captions)))])
            latents.append((vae.encoder(batch).float().chunk(2, 1)[0] * vae.config.scaling_factor).half())
            images.append(see(batch[:, :, 0], encoders["image_encoder"]).half())
    return EncodedBucket(
        bucket,
        torch.cat(latents),
        torch.tensor([library.numbers[caption] for caption in captions], device=device),
        torch.tensor([library.letters.index(letter) for letter in letters], device=device),
        torch.cat(images),
    )


def see(pictures: Tensor, encoder: nn.Module) -> Tensor:
    """Return the image encoder's embeddings of pictures [batch, 3, height, width], from -1 to 1.

    The pipeline's image processor gives the same up to the rounding of resized pixels.
    """
    side = (text.IMAGE_SIDE, text.IMAGE_SIDE)
    resized = F.interpolate(pictures.float(), size=side, mode="bicubic", antialias=True, align_corners=False)
    return encoder(pixel_values=resized.clamp(-1, 1)).last_hidden_state
