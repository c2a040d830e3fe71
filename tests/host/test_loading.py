"""Loading: incomplete and foreign folders are refused, and ComfyUI moves the components."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance


@pytest.fixture
def folder(tiny_folders, tmp_path) -> Path:
    """A copy of the tiny text-to-video pipeline that tests may damage."""
    return Path(shutil.copytree(tiny_folders["t2v"], tmp_path / "Model"))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def shard(folder: Path) -> None:
    """Split the transformer's weights into two files, one of which is missing."""
    transformer = folder / "transformer"
    (transformer / "diffusion_pytorch_model.safetensors").rename(transformer / "part-1-of-2.safetensors")
    names = {"weight_map": {"a": "part-1-of-2.safetensors", "b": "part-2-of-2.safetensors"}}
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(names))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "Model has no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json cannot be read"),
        (lambda f: edit(f / "model_index.json", _class_name="WanPipeline"), "is a 'WanPipeline'"),
        (
            lambda f: edit(f / "model_index.json", vae=["diffusers", "AutoencoderKLWan"]),
            "vae is AutoencoderKLWan",
        ),
        (lambda f: shutil.rmtree(f / "text_encoder"), "no folder text_encoder with the Qwen2_5_VLTextModel"),
        (lambda f: (f / "vae" / "config.json").unlink(), "no vae/config.json"),
        (lambda f: (f / "text_encoder_2" / "model.safetensors").unlink(), "text_encoder_2 has no model.safetensors"),
        (shard, "transformer has no part-2-of-2.safetensors"),
    ],
)
def test_an_incomplete_folder_is_refused_with_what_is_missing(pack, folder, damage, message):
    pack.loading.check_folder(folder)
    damage(folder)
    with pytest.raises(ValueError) as refusal:
        pack.loading.load_pipeline(folder, torch.float32, "none")
    assert message in str(refusal.value)


EVIL = """
import os, pathlib
pathlib.Path(os.environ["HV15_EVIL"]).touch()
"""


@pytest.fixture
def evil(folder, tmp_path, monkeypatch) -> Path:
    """The path of a file that exists once code of the folder has run."""
    ran = tmp_path / "code of the folder has run"
    monkeypatch.setenv("HV15_EVIL", str(ran))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_module.py").write_text(EVIL)
    return ran


PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler", "guider")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("library", ["evil", "evil_module", "diffusers"])
def test_no_code_of_a_folder_runs(pack, folder, evil, part, library):
    """diffusers may import a module of that name, or run a file of that name next to the weights."""
    kind = json.loads((folder / "model_index.json").read_text())[part][1]
    edit(folder / "model_index.json", **{part: [library, kind]})
    if library != "evil_module":
        (folder / part / f"{library}.py").write_text(EVIL)
    with pytest.raises(ValueError, match=r"contains code|only classes of diffusers and transformers"):
        pack.loading.load_pipeline(folder, torch.float32, "none")
    assert not evil.exists()


def test_code_that_a_folder_names_would_be_noticed(folder, evil):
    """The file that the test above looks for is written when such a module is imported."""
    import importlib

    importlib.import_module("evil_module")
    assert evil.exists()


def pickled(path: Path) -> None:
    """Write weights that run code when they are unpickled."""

    class Evil:
        def __reduce__(self) -> tuple:
            return (eval, ("open(__import__('os').environ['HV15_EVIL'], 'w')",))

    torch.save(Evil(), path)


@pytest.mark.parametrize(
    ("part", "name"),
    [("transformer", "diffusion_pytorch_model"), ("text_encoder", "model"), ("text_encoder_2", "model")],
)
def test_weights_that_are_not_safetensors_are_not_read_even_next_to_a_safetensors_file(pack, folder, evil, part, name):
    weights = folder / part / f"{name}.safetensors"
    weights.rename(weights.with_name("decoy.safetensors"))
    pickled(weights.with_name("pytorch_model.bin" if name == "model" else f"{name}.bin"))
    with pytest.raises(ValueError, match=f"{part} has no {name}.safetensors"):
        pack.loading.load_pipeline(folder, torch.float32, "none")
    names = {"weight_map": {"a": "decoy.safetensors", "b": "../../somewhere.bin"}}
    weights.with_name(f"{name}.safetensors.index.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"only \*\.safetensors are read"):
        pack.loading.load_pipeline(folder, torch.float32, "none")
    assert not evil.exists()


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", DEEP, "cannot be read as JSON"),
        ("model_index.json", "[1]", "is not a JSON object"),
        ("transformer/config.json", DEEP, "cannot be read as JSON"),
        ("transformer/config.json", "[]", "is not a JSON object"),
        ("transformer/config.json", b"\xff\xfe", "cannot be read as JSON"),
        ("model_index.json", {"vae": "diffusers"}, "must be a library and a class"),
        ("model_index.json", {"vae": [["diffusers"], {}]}, "must be a library and a class"),
        ("model_index.json", {"vae": [None, None]}, "has no vae, which"),
        ("model_index.json", {"_class_name": ["evil", "HunyuanVideo15Pipeline"]}, "this node loads"),
        ("model_index.json", {"text_encoder": ["transformers", "AutoModel"]}, "only classes of"),
        ("model_index.json", {"../vae": ["diffusers", "X"]}, "a component with the invalid name"),
        ("transformer/config.json", {"num_layers": 10_000_000}, "requests 10000000 layers"),
        ("transformer/config.json", {"num_refiner_layers": 10_000_000}, "requests 10000000 layers"),
        ("vae/config.json", {"layers_per_block": 10_000_000}, "requests 10000000 layers"),
        ("vae/config.json", {"block_out_channels": [1] * 2000}, "requests 2000 layers"),
        ("text_encoder/config.json", {"num_hidden_layers": 10_000_000}, "requests 10000000 layers"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "refers to code in"),
        ("text_encoder/config.json", {"attn_implementation": "someone/kernel"}, "refers to code in"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "requests 1000000000000 steps"),
        ("model_index.json", {"vae": ["\u001b[31m" * 1000, "X"]}, "only classes of"),
    ],
)
def test_a_folder_with_malicious_or_invalid_files_is_refused_at_once_with_a_message(
    pack, folder, file, content, message
):
    if isinstance(content, dict):
        edit(folder / file, **content)
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.monotonic()
    with pytest.raises(ValueError) as refusal:
        pack.loading.load_pipeline(folder, torch.float32, "none")
    assert message in str(refusal.value) and str(refusal.value).isprintable() and len(str(refusal.value)) < 500
    assert time.monotonic() - began < 5


def test_folders_of_models_diffusers_are_listed_and_loaded(pack, tiny_folders, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path / "none"), str(tmp_path)])
    shutil.copytree(tiny_folders["i2v"], tmp_path / "HunyuanVideo-1.5-480p_i2v")
    (tmp_path / "something else").mkdir()
    (model, *_) = pack.loading.LoadPipeline.define_schema().inputs
    assert model.options == ["tiny (built in)", "tiny i2v (built in)", "HunyuanVideo-1.5-480p_i2v"]
    pipeline, vae = pack.loading.LoadPipeline.execute("HunyuanVideo-1.5-480p_i2v", "auto", "model").result
    assert pipeline.takes_image and vae.latent_channels == 32
    with pytest.raises(ValueError, match="no folder gone"):
        pack.loading.LoadPipeline.execute("gone", "auto", "model")


@pytest.mark.parametrize("file", ["transformer/config.json", "text_encoder/model.safetensors", "model_index.json"])
def test_a_model_with_a_changed_file_is_loaded_again(pack, folder, monkeypatch, file):
    monkeypatch.setattr(pack.loading, "model_folder", lambda name: folder)
    before = pack.loading.LoadPipeline.fingerprint_inputs("Model", "auto", "model")
    assert pack.loading.LoadPipeline.fingerprint_inputs("Model", "auto", "model") == before
    (folder / file).write_bytes((folder / file).read_bytes() + b"\n")
    assert pack.loading.LoadPipeline.fingerprint_inputs("Model", "auto", "model") != before


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_all_components_have_the_chosen_dtype(pack, name):
    pipeline, vae = pack.loading.LoadPipeline.execute("tiny (built in)", name, "none").result
    dtype = getattr(torch, name)
    parts = [pipeline.pipeline.transformer, pipeline.pipeline.text_encoder, pipeline.pipeline.text_encoder_2]
    assert {parameter.dtype for part in parts for parameter in part.parameters()} <= {dtype, torch.float32}
    assert pipeline.pipeline.transformer.dtype == pipeline.pipeline.text_encoder.dtype == vae.vae_dtype == dtype


def test_unloading_weights_from_the_device_copies_nothing(pack, tiny_folders):
    """torch's meta device is used, because nothing can be copied from it."""
    pipeline = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "model")
    patcher, transformer = pipeline.patchers["transformer"], pipeline.pipeline.transformer
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in transformer.named_parameters()}
    patcher.partially_load(torch.device("meta"))
    assert all(weight.is_meta for weight in transformer.parameters())
    patcher.detach()
    for name, weight in transformer.named_parameters():
        assert weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1])


def test_copies_on_the_device_have_the_values_and_the_ties_of_the_host(pack, tiny_folders):
    """The CPU with an index stands for the device: PyTorch compares it as another device."""
    pipeline = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "model")
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        holder, part = pipeline.patchers[name].model, getattr(pipeline.pipeline, name)
        tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in tensors.items()}
        with torch.inference_mode():  # as in the nodes
            holder.arrive(torch.device("cpu:0"))
        for key, (place, value) in before.items():
            assert tensors[key].data_ptr() != place and torch.equal(tensors[key], value)
        every = {id(tensor): tensor for tensor in part.state_dict(keep_vars=True).values()}
        assert len({tensor.data_ptr() for tensor in every.values()}) == len(every)
        holder.leave()
        assert all(tensors[key].data_ptr() == place for key, (place, _) in before.items())
    assert len(list(part.named_parameters(remove_duplicate=False))) > len(list(part.named_parameters()))  # tied


def test_text_to_video_holds_no_second_copy_of_the_vae(pack, tiny_folders):
    text, image = (pack.loading.load_pipeline(tiny_folders[kind], torch.float32, "none") for kind in ("t2v", "i2v"))
    assert "vae" not in text.patchers and all(p.is_meta for p in text.pipeline.vae.parameters())
    assert "vae" in image.patchers and image.pipeline.vae.decoder is None


def loaded_components(loaded) -> set[str]:
    """Return the names of the components that ComfyUI counts as loaded."""
    import comfy.model_management as management

    entries = [entry.model for entry in management.current_loaded_models]
    return {name for name, patcher in loaded.patchers.items() if any(entry is patcher for entry in entries)}


def test_model_offload_counts_a_component_as_loaded_while_it_runs(pack, tiny_folders):
    loaded = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "model")
    with loaded.on_device("text_encoder"):
        assert loaded_components(loaded) == {"text_encoder"}
    assert loaded_components(loaded) == set()
    with pytest.raises(RuntimeError), loaded.on_device("transformer"):
        raise RuntimeError
    assert loaded_components(loaded) == set()


def test_without_offload_a_component_stays_loaded_until_comfyui_frees_it(pack, tiny_folders):
    import comfy.model_management as management

    loaded = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "none")
    for name in ("text_encoder", "transformer"):
        with loaded.on_device(name):
            pass
    assert loaded_components(loaded) == {"text_encoder", "transformer"}
    management.unload_all_models()
    assert loaded_components(loaded) == set()
    with loaded.on_device("transformer"):
        assert "transformer" in loaded_components(loaded)


def test_the_requested_memory_grows_with_the_video(pack, tiny_folders):
    transformer = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "none").pipeline.transformer
    small, large = (pack.sampling.working_memory(transformer, 848, 480, frames) for frames in (5, 121))
    assert 0 < small * 15 < large


def test_a_component_is_loaded_completely_or_not_at_all(pack, tiny_folders, monkeypatch):
    import comfy.model_management as management

    loaded = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "none")
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    with loaded.on_device("transformer"):
        patcher = loaded.patchers["transformer"]
        assert patcher.loaded_size() == patcher.model_size()
        (entry,) = [entry for entry in management.current_loaded_models if entry.model is patcher]
        assert entry.model_unload(memory_to_free=1000) and patcher.loaded_size() == 0
        management.current_loaded_models.remove(entry)


def test_a_deleted_pipeline_is_removed_from_comfyuis_loaded_models(pack, tiny_folders):
    import gc

    import comfy.model_management as management

    loaded = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "none")
    with loaded.on_device("transformer"):
        assert loaded_components(loaded)
    patchers = {id(patcher) for patcher in loaded.patchers.values()}
    del loaded
    gc.collect()
    management.cleanup_models_gc()
    assert not patchers & {id(entry.model) for entry in management.current_loaded_models}


class Changing(ClassifierFreeGuidance):
    """Changes layers of diffusers' own forward, as far as the pack can tell."""

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        pass


def test_a_transformer_that_streams_its_layers_gives_the_same_latents(pack, tiny_folders):
    pytest.importorskip("accelerate")  # which diffusers needs to stream layers
    size = {"width": 48, "height": 32, "frames": 5, "steps": 2, "guidance": 3.0, "shift": 5.0, "seed": 5}
    results = []
    for streams in (False, True):
        loaded = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "model")
        if streams:
            loaded.pipeline.guider = Changing()
            pack.loading.stream_layers(loaded.pipeline.transformer, torch.device("cpu"))
            del loaded.patchers["transformer"]
        results.append(pack.sampling.sample(loaded, pack.text.encode(loaded, "a fox", ""), **size))
    # Streamed layers run in diffusers' own forward, the others in the fast one: the results are equal up to rounding.
    assert (results[1] - results[0]).norm() / results[0].norm() < 1e-5


def test_group_offload_keeps_the_transformer_in_host_memory(pack, tiny_folders, monkeypatch):
    """On an accelerator, which the test does not use. diffusers streams layers only for guiders that change them."""
    import comfy.model_management as management

    pipeline = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "group").pipeline
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(pack.loading.importlib.util, "find_spec", lambda name: None)
    loaded = pack.loading.LoadedPipeline(pipeline, "group", Path())
    assert loaded.streams_transformer and loaded.patchers.keys() == {"text_encoder", "text_encoder_2"}
    pipeline.guider = Changing()
    with pytest.raises(ValueError, match="needs the package accelerate"):
        pack.loading.LoadedPipeline(pipeline, "group", Path())
    assert not pack.loading.LoadedPipeline(pipeline, "model", Path()).streams_transformer


def test_group_offload_has_no_effect_on_the_cpu(pack, tiny_folders):
    assert not pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "group").streams_transformer
