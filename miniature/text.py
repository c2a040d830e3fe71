"""The miniature's text and image encoders: the real ones' classes at small widths, with seeded random weights.

They are not trained. The transformer learns to read them. The tokenizer has one token for each word of the captions and
one for each byte of any other text, so that every prompt can be encoded. The pipeline takes the text encoder's hidden
state before the last two layers, which is the state after the first of its three layers here: each token's own random
vector, mixed with those of the tokens before it. The random generator of each weight is seeded with the weight's name,
so that the encoders are the same on every machine.
"""

import hashlib
import inspect
import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from diffusers import HunyuanVideo15Pipeline
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

LIST = """
and big blue brick burrow circle comes cross dark does down floor front goes green grey in its left letter meadow move
moves moving night not of out pink rabbit red right road sea sky square standing stands star still the triangle up wall
white with wooden yellow
"""
WORDS = tuple(LIST.split())
"""Words that are one token each: those of all captions, in lower case."""
WIDTH = 64
"""Width of all encoders."""
IMAGE_SIDE, IMAGE_PATCH = 128, 16
"""Pixels of the image encoder's picture and of its patches: 64 tokens."""
DIGEST = "21550c6bf9774e3b"
"""`digest` of the encoders. A transformer works only with the encoders that it was trained with."""
PREFIX = "vision_model."
"""Start of the image encoder's names in transformers 4, but not in 5."""
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spellings(word: str) -> tuple[str, ...]:
    """Return the spellings of a word that have the same vector. "Ġ" is a space in the tokenizer's alphabet."""
    return f"Ġ{word}", word, f"Ġ{word.capitalize()}", word.capitalize()


def tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level Qwen2 tokenizer with a token for each word of the captions.

    The pipeline removes the first `crop_start` tokens, because the prompt begins there with the real vocabulary. To
    make it begin there with this vocabulary too, the end of the system message is one token.
    """
    merges, tokens = [], list(bytes_to_unicode().values())
    for spelling in (spelling for group in zip(*map(spellings, WORDS), strict=True) for spelling in group):
        for end in range(1, len(spelling)):
            if spelling[: end + 1] not in tokens:
                merges.append(f"{spelling[:end]} {spelling[end]}")
                tokens.append(spelling[: end + 1])
    plain = _tokenizer([*tokens, *MARKS], merges, MARKS[1:])
    defaults = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    message, crop_start = defaults["system_message"].default, defaults["crop_start"].default
    around = len(plain("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")["input_ids"])
    head = next(n for n in range(len(message)) if len(plain(message[:n])["input_ids"]) == crop_start - 1 - around)
    tail = message[head:]
    return _tokenizer([*tokens, *MARKS, tail], merges, (*MARKS[1:], tail))


def encoders() -> dict[str, object]:
    """Return tokenizers, encoders and image processor under the names that the pipelines give them.

    Raises ValueError if the weights are not the usual ones, which another numpy could cause.
    """
    reader = tokenizer()
    parts = {
        "tokenizer": reader,
        "text_encoder": Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(reader),
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=None,
                eos_token_id=None,
                rope_theta=10000.0,
                rope_scaling={"rope_type": "default", "mrope_section": [2, 3, 3]},
            )
        ),
        "tokenizer_2": ByT5Tokenizer(),
        "text_encoder_2": T5EncoderModel(
            T5Config(vocab_size=384, d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=4)
        ),
        "image_encoder": SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=4,
                image_size=IMAGE_SIDE,
                patch_size=IMAGE_PATCH,
            )
        ),
        "feature_extractor": SiglipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
    }
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            _draw(name, part.eval().requires_grad_(False))
    vectors = parts["text_encoder"].embed_tokens.weight
    for word in WORDS:
        first, *others = (reader.convert_tokens_to_ids(spelling) for spelling in spellings(word))
        vectors[others] = vectors[first].clone()
    if digest(parts) != DIGEST:
        raise ValueError(f"The encoders' weights have the digest {digest(parts)}, and {DIGEST} on other machines.")
    return parts


def digest(parts: dict[str, object]) -> str:
    """Return a hash of the encoders' weights and vocabulary."""
    hashed = hashlib.sha256(json.dumps(sorted(parts["tokenizer"].get_vocab().items())).encode())
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        weights = {key.removeprefix(PREFIX): weight for key, weight in parts[name].state_dict().items()}
        for key, weight in sorted(weights.items()):
            hashed.update(f"{name}.{key}".encode() + weight.cpu().float().numpy().tobytes())
    return hashed.hexdigest()[:16]


@torch.no_grad()
def _draw(prefix: str, model: torch.nn.Module) -> None:
    """Draw every weight from a uniform distribution that preserves the variance of activations. Norms keep theirs."""
    tables = {id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Embedding)}
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and not name.endswith("bias"):
            continue
        inputs = 1 if id(weight) in tables else weight[0].numel()
        bound = 0.02 if weight.ndim == 1 else (3 / inputs) ** 0.5
        random = np.random.Generator(np.random.PCG64(zlib.crc32(f"{prefix}.{name.removeprefix(PREFIX)}".encode())))
        weight.copy_(torch.from_numpy(((random.random(weight.shape) * 2 - 1) * bound).astype(np.float32)))


def _tokenizer(tokens: list[str], merges: list[str], special: tuple[str, ...]) -> Qwen2Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        rules.write_text("\n".join(["#version: 0.2", *merges, ""]))
        made = Qwen2Tokenizer.from_pretrained(folder, additional_special_tokens=[*special])
    made.pad_token = MARKS[0]
    made.chat_template = CHAT
    return made
