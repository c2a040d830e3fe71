"""Checkpoints of the transformer: both layouts, tensor by tensor, and refusals in words."""

import json
import re

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from distributed.denoise.layout import Architecture, source_of
from distributed.denoise.weights import (
    TransformerCheckpoint,
    architecture_of_core,
    open_transformer,
    part_of,
    sources,
    stored_tensors,
)
from distributed.errors import CheckpointError
from tests.unit.checkpoints import HOSTILE, assert_harmless, assert_same
from tests.unit.denoise_models import make_model

ORIGINAL = {"num_attention_heads": 1, "attention_head_dim": 128, "rope_axes_dim": (16, 56, 56), "use_meanflow": True}
"""Sizes that the original layout can have: those of a head are fixed there."""


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "transformer", max_shard_size="1MB")
    return tmp_path


def in_original_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put together what the original layout has in one tensor, written independently of how it is taken apart."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        key, third, swapped = source_of(name)
        if swapped:
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        found.setdefault(key, {})[third or 0] = tensor
    return {key: torch.cat([parts[i] for i in sorted(parts)]) for key, parts in found.items()}


def in_tencents_spelling(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a file in core's layout as Tencent's files are, and take the blocks' queries, keys and values apart."""
    renamed = {}
    for key, tensor in original.items():
        for old, new in (
            (".norm.query_norm.", "_q_norm."),
            (".norm.key_norm.", "_k_norm."),
            ("_attn.proj.", "_attn_proj."),
            ("_mod.lin.", "_mod.linear."),
            ("mlp.0.", "mlp.fc1."),
            ("mlp.2.", "mlp.fc2."),
            ("self_attn.qkv.", "self_attn_qkv."),
            ("time_in.in_layer.", "time_in.mlp.0."),
            ("time_in.out_layer.", "time_in.mlp.2."),
            ("c_embedder.in_layer.", "c_embedder.linear_1."),
            ("c_embedder.out_layer.", "c_embedder.linear_2."),
        ):
            key = key.replace(old, new)
        if "_attn.qkv." in key:
            renamed |= {key.replace(".qkv.", f"_{part}."): t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            renamed[key] = tensor
    return {key: tensor.contiguous() for key, tensor in renamed.items()}


def tensors_of(checkpoint: TransformerCheckpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All weights in diffusers' names, as a rank has them."""
    names, layout = sources(checkpoint), checkpoint.layout
    wholes = {key: stored.to("cpu", dtype) for key, stored in stored_tensors(checkpoint)}
    return {name: part_of(whole, name, layout) for key, whole in wholes.items() for name in names[key]}


@pytest.mark.parametrize("sizes", [{}, {"num_attention_heads": 2, "num_layers": 1, "use_meanflow": True}])
def test_shapes_are_those_of_diffusers_module(sizes):
    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(**sizes)
    heads, layers = sizes.get("num_attention_heads", 16), sizes.get("num_layers", 54)
    architecture = Architecture(heads=heads, layers=layers, meanflow="use_meanflow" in sizes)
    assert architecture.shapes() == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert architecture.config.items() <= dict(model.config).items()


def test_a_folder_in_parts_gives_all_tensors(folder):
    checkpoint = open_transformer(folder)
    assert len(checkpoint.files) > 1 and checkpoint.layout == "diffusers"
    assert_same(tensors_of(checkpoint), make_model().state_dict())
    assert open_transformer(folder / "transformer").identity == checkpoint.identity


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("norm", ["weight", "scale"])
def test_a_file_of_the_original_layout_gives_all_tensors(tmp_path, prefix, norm):
    weights = make_model(**ORIGINAL).state_dict()
    original = in_original_layout(weights)
    renamed = {prefix + re.sub(r"_norm\.weight$", f"_norm.{norm}", key): value for key, value in original.items()}
    path = tmp_path / "model.safetensors"
    save_file(renamed | ({"vae.conv.weight": torch.zeros(1)} if prefix else {}), path)
    checkpoint = open_transformer(path)
    assert checkpoint.layout == "core"
    assert checkpoint.architecture.config.items() <= dict(make_model(**ORIGINAL).config).items()
    assert_same(tensors_of(checkpoint), weights)


def test_a_file_of_tencents_gives_all_tensors(tmp_path):
    weights = make_model(**ORIGINAL).state_dict()
    renamed = in_tencents_spelling(in_original_layout(weights))
    assert {"double_blocks.0.img_attn_q.weight", "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.bias"} < {
        *renamed
    }
    save_file(renamed, tmp_path / "model.safetensors")
    checkpoint = open_transformer(tmp_path / "model.safetensors")
    assert checkpoint.layout == "tencent"
    assert_same(tensors_of(checkpoint), weights)
    del renamed["double_blocks.1.txt_attn_v.bias"]
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"txt_attn\.v\.bias"):
        open_transformer(tmp_path / "model.safetensors")


LAYERS = {"double_blocks.0.img_attn.qkv": torch.float8_e4m3fn, "txt_in.input_embedder": torch.float8_e4m3fn}
LAYERS |= {"double_blocks.1.txt_mlp.2": torch.float8_e5m2}
MARKER = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
SCALED = {
    "older": ({"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "scale_weight", "scale_input", {}),
    "newer": ({}, "weight_scale", "input_scale", {"comfy_quant": MARKER}),
}


@pytest.mark.parametrize("spelling", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaled_8_bit_weights_are_rounded_as_core_rounds_them(tmp_path, spelling, dtype):
    further, scale_key, input_key, of_layer = SCALED[spelling]
    exact = {key: tensor.half() for key, tensor in in_original_layout(make_model(**ORIGINAL).state_dict()).items()}
    file, expected = {**exact, **further}, {key: tensor.to(dtype) for key, tensor in exact.items()}
    for layer, stored in LAYERS.items():
        scale = exact[f"{layer}.weight"].float().abs().max() / 448
        file[f"{layer}.weight"] = (exact[f"{layer}.weight"].float() / scale).to(stored)
        file |= {f"{layer}.{scale_key}": scale, f"{layer}.{input_key}": torch.tensor(2.0)}
        file |= {f"{layer}.{name}": tensor.clone() for name, tensor in of_layer.items()}
        expected[f"{layer}.weight"] = file[f"{layer}.weight"].to(dtype) * scale.to(dtype)
    path = tmp_path / "model.safetensors"
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in file.items()}, path)
    found = in_original_layout(tensors_of(open_transformer(path), dtype))
    assert_same(found, expected)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_weights_without_scales_are_read(tmp_path, stored):
    weights = {k: t.to(stored) for k, t in in_original_layout(make_model(**ORIGINAL).state_dict()).items()}
    save_file(weights, tmp_path / "model.safetensors")
    found = in_original_layout(tensors_of(open_transformer(tmp_path / "model.safetensors")))
    assert_same(found, {key: tensor.float() for key, tensor in weights.items()})


def test_scales_may_be_in_another_file_than_their_weights(tmp_path):
    weights = in_original_layout(make_model(**ORIGINAL).state_dict())
    scales = {"img_in.proj.scale_weight": torch.tensor(2.0)}
    save_file(weights, tmp_path / "one.safetensors")
    save_file(scales, tmp_path / "two.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "one.safetensors") | dict.fromkeys(scales, "two.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = tensors_of(open_transformer(tmp_path / "model.safetensors.index.json"))
    assert torch.equal(found["x_embedder.proj.weight"], 2 * weights["img_in.proj.weight"])


def test_tensors_that_the_transformer_does_not_read_are_ignored_in_the_original_layout(tmp_path):
    weights = in_original_layout(make_model(**ORIGINAL).state_dict())
    save_file(
        weights | {"logit_scale": torch.ones(()), "ema.step": torch.zeros(1, dtype=torch.int64)},
        tmp_path / "a.safetensors",
    )
    assert_same(in_original_layout(tensors_of(open_transformer(tmp_path / "a.safetensors"))), weights)


def test_keys_and_shapes_alone_tell_whether_it_is_the_transformer():
    shapes = {
        key: tuple(tensor.shape) for key, tensor in in_original_layout(make_model(**ORIGINAL).state_dict()).items()
    }
    architecture = architecture_of_core(shapes, "The model")
    assert architecture.config.items() <= dict(make_model(**ORIGINAL).config).items()
    for change, words in (
        ({"vector_in.in_layer.weight": (1, 1)}, "The model is not a .* further tensors"),
        ({"img_in.proj.weight": (128, 9, 1, 2, 2)}, "The model is not a complete"),
        ({"cond_type_embedding.weight": (4, 128)}, "instead of"),
    ):
        with pytest.raises(CheckpointError, match=words):
            architecture_of_core(shapes | change, "The model")
    with pytest.raises(CheckpointError, match="The model holds 'double_blocks"):
        architecture_of_core({"double_blocks.0.img_attn.qkv.weight": (1, 1)}, "The model")
    with pytest.raises(CheckpointError, match="diffusers' layout, not those of ComfyUI's"):
        architecture_of_core({key: tuple(t.shape) for key, t in make_model().state_dict().items()}, "The model")


def change_config(folder, **changes):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "holds a 'FluxTransformer2DModel'"),
        ({"num_layers": 10**9}, "num_layers is '1000000000'"),
        ({"num_layers": 1000}, "asks for 1000 and 2 layers"),
        ({"num_layers": 4}, "lacks 'transformer_blocks.3"),
        ({"num_layers": 2}, "has further tensors ('transformer_blocks.2"),
        ({"patch_size": 2}, "patch_size is '2'; HunyuanVideo-1.5 has 1"),
        ({"rope_axes_dim": [4, 6, 8]}, "three even numbers"),
        ({"mlp_ratio": "4"}, "mlp_ratio is '4'"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is 'nan'"),
        ({"use_meanflow": 1}, "true or false"),
        ({"text_embed_dim": 25}, "of shape (64, 24) instead of (64, 25)"),
        ({"num_attention_heads": True}, "num_attention_heads is 'True'"),
        ({"qk_norm": HOSTILE}, "qk_norm is"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, words):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError) as refusal:
        open_transformer(folder)
    assert words in str(refusal.value)
    assert_harmless(refusal.value)


def test_a_file_without_its_config_is_refused(folder):
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json beside it"):
        open_transformer(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("double_blocks.1.txt_mlp.2.bias"), "lacks 'double_blocks.1.txt_mlp.2.bias'"),
        (lambda w: w.pop("img_in.proj.weight"), "lacks 'img_in.proj.weight'"),
        (lambda w: w.update({"single_blocks.0.linear1.weight": torch.zeros(1)}), "single-stream blocks"),
        (lambda w: w.update({"guidance_in.in_layer.bias": torch.zeros(1)}), "further tensors ('guidance_in"),
        (lambda w: w.update({"img_in.proj.bias": torch.zeros(128, dtype=torch.int8)}), "as I8"),
        (
            lambda w: w.update({"img_in.proj.weight_scale": torch.tensor(float("inf"))}),
            "of inf; a scale must be a finite",
        ),
        (lambda w: w.update({"txt_in.input_embedder.scale_weight": torch.ones(128, 2)}), "one scale for each layer"),
        (
            lambda w: w.update(
                {"img_in.proj.scale_weight": torch.ones(()), "img_in.proj.weight_scale": torch.ones(())}
            ),
            "twice",
        ),
        (lambda w: w.update({"img_in.proj.bias": torch.zeros(127)}), "of shape (127,) instead of (128,)"),
        (lambda w: w.update({"time_in.mlp.0.bias": torch.zeros(128)}), "holds the same tensor twice"),
        (lambda w: w.clear(), "holds nothing, and is not"),
        (lambda w: w.pop("cond_type_embedding.weight"), "is not HunyuanVideo-1.5's transformer"),
    ],
)
def test_a_file_of_the_original_layout_that_is_not_whole_is_refused(tmp_path, change, words):
    weights = in_original_layout(make_model(**ORIGINAL).state_dict())
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        open_transformer(tmp_path / "model.safetensors")
    assert words in str(refusal.value)
    assert_harmless(refusal.value)
