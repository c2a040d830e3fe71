"""A complete HunyuanVideo-1.5 pipeline in miniature: all components, small widths, seeded random weights.

It is generated locally, without a download, in diffusers format, and loads like a real checkpoint. Its videos are
coloured noise. The random generator of each weight is seeded with the weight's name, so that the model is the same on
every machine, whatever the order in which libraries create their layers.
"""

import inspect
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

TINY = {"tiny (built in)": "t2v", "tiny i2v (built in)": "i2v"}
"""Kind of each built-in model, by its name in the lists."""

VERSION = 2
"""Part of the folder's name. Increase it when the weights change."""

PREFIX = "vision_model."
"""Start of the image encoder's names in transformers 4, but not in 5."""


def ensure_tiny(kind: str, parent: Path) -> Path:
    """Return the folder of the tiny pipeline, "t2v" or "i2v", in `parent`. It is created if it does not exist.

    Several processes may call this at once: the folder is created atomically.
    """
    folder = parent / f"hv15-tiny-{kind}-v{VERSION}"
    if not folder.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".hv15-tiny-", dir=parent))
        try:
            build(kind).save_pretrained(draft)
            os.rename(draft, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has created it
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def build(kind: str):
    """Return the pipeline, "t2v" or "i2v"."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15ImageToVideoPipeline,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import (
        ByT5Tokenizer,
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SiglipVisionModel,
        T5Config,
        T5EncoderModel,
    )

    width = 32
    prompt = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    tokenizer = _tokenizer(prompt["system_message"].default, prompt["crop_start"].default)
    parts = {
        "transformer": HunyuanVideo15Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=width,
            text_embed_2_dim=width,
            image_embed_dim=width,
            rope_axes_dim=(4, 6, 6),
            target_size=128,
            task_type=kind,
        ),
        "vae": AutoencoderKLHunyuanVideo15(block_out_channels=(8, 16, 32, 64, 64)),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
        "tokenizer": tokenizer,
        "text_encoder": Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=1,
                bos_token_id=None,
                eos_token_id=None,
                rope_theta=10000.0,
                rope_scaling={"rope_type": "default", "mrope_section": [2, 3, 3]},
            )
        ),
        "tokenizer_2": ByT5Tokenizer(),
        "text_encoder_2": T5EncoderModel(
            T5Config(vocab_size=384, d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2)
        ),
    }
    if kind == "t2v":
        _draw(parts)
        return HunyuanVideo15Pipeline(**parts)
    parts["image_encoder"] = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=384,
            patch_size=14,
        )
    )
    parts["feature_extractor"] = SiglipImageProcessor(size={"height": 384, "width": 384})
    _draw(parts)
    return HunyuanVideo15ImageToVideoPipeline(**parts)


@torch.no_grad()
def _draw(parts: dict) -> None:
    """Draw every weight from a uniform distribution that preserves the variance of activations. Norms keep theirs."""
    for part, model in parts.items():
        if not isinstance(model, torch.nn.Module):
            continue
        tables = {id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Embedding)}
        for name, weight in model.named_parameters():
            if name.endswith("gamma") or (weight.ndim == 1 and not name.endswith("bias")):
                continue
            inputs = 1 if id(weight) in tables else weight[0].numel()
            bound = 0.02 if weight.ndim == 1 else (3 / inputs) ** 0.5
            seed = zlib.crc32(f"{part}.{name.removeprefix(PREFIX)}".encode())
            random = np.random.Generator(np.random.PCG64(seed))
            weight.copy_(torch.from_numpy(((random.random(weight.shape) * 2 - 1) * bound).astype(np.float32)))


def _tokenizer(system_message: str, crop_start: int):
    """Return a byte-level Qwen2 tokenizer without merges: one token per byte, plus the chat marks.

    The pipeline removes the first `crop_start` tokens, because the prompt begins there with the real vocabulary. To
    make it begin there with this vocabulary too, the end of the system message is one token of the necessary length.
    """
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    around = 3 + len("system\n\nuser\n")  # tokens before the prompt, apart from the system message
    tail = system_message[crop_start - 1 - around :]
    vocabulary = {token: i for i, token in enumerate([*bytes_to_unicode().values(), *marks, tail])}
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps(vocabulary))
        merges.write_text("#version: 0.2\n")
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, additional_special_tokens=[*marks[1:], tail])
    tokenizer.pad_token = marks[0]
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer
