"""The built-in tiny model: complete, the same on every machine, with visible and moving pictures."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline
from safetensors.torch import load_file

TINY = Path(__file__).resolve().parent.parent.parent / "nodes" / "tiny.py"
CLASSES = {"t2v": HunyuanVideo15Pipeline, "i2v": HunyuanVideo15ImageToVideoPipeline}


def digest(folder: Path) -> str:
    """Return a hash of the pipeline's weights and their names."""
    hashed = hashlib.sha256()
    for file in sorted(folder.glob("*/*.safetensors")):
        weights = {name.removeprefix("vision_model."): weight for name, weight in load_file(file).items()}
        for name, weight in sorted(weights.items()):
            hashed.update(f"{file.parent.name}.{name}".encode() + weight.numpy().tobytes())
    return hashed.hexdigest()[:16]


@pytest.mark.parametrize(("kind", "expected"), [("t2v", "f3bfbda6f9649152"), ("i2v", "1cd887bf1b93c4f0")])
def test_the_weights_are_the_same_on_every_machine(tiny_folders, kind, expected):
    assert digest(tiny_folders[kind]) == expected


@pytest.mark.parametrize("kind", CLASSES)
def test_diffusers_loads_it_with_every_component(tiny_folders, kind):
    pipeline = CLASSES[kind].from_pretrained(tiny_folders[kind], local_files_only=True)
    assert all(part is not None for part in pipeline.components.values())
    vae = pipeline.vae
    assert (vae.config.latent_channels, vae.spatial_compression_ratio, vae.temporal_compression_ratio) == (32, 16, 4)


def test_the_pipeline_removes_the_tokens_before_the_prompt_and_no_others(tiny_folders):
    pipeline = HunyuanVideo15Pipeline.from_pretrained(tiny_folders["t2v"], local_files_only=True)
    chat = [{"role": "system", "content": pipeline.system_message}, {"role": "user", "content": "a red fox"}]
    ids = pipeline.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    kept = pipeline.tokenizer.decode(ids[pipeline.prompt_template_encode_start_idx :])
    assert kept.startswith("a red fox<|im_end|>")


def test_the_prompt_changes_the_embeddings_and_quoted_text_is_encoded_by_byt5(tiny_folders):
    pipeline = HunyuanVideo15Pipeline.from_pretrained(tiny_folders["t2v"], local_files_only=True)

    def encode(prompt: str) -> tuple:
        with torch.no_grad():
            return pipeline.encode_prompt(prompt=prompt, device="cpu", dtype=torch.float32)

    (fox, mask, _, glyph_mask), (cat, *_), (_, _, glyphs, sign_mask) = map(
        encode, ("a red fox", "a red cat", 'a sign "stop"')
    )
    assert mask.sum() > 9 and (fox - cat)[:, :9].abs().max() > 0.1
    assert glyph_mask.sum() == 0 and sign_mask.sum() > 4 and glyphs.std() > 0


def test_its_videos_have_contrast_and_motion(tiny_folders):
    pipeline = HunyuanVideo15Pipeline.from_pretrained(tiny_folders["t2v"], local_files_only=True)
    with torch.no_grad():
        latent = torch.randn(1, 32, 2, 6, 8, generator=torch.Generator().manual_seed(1))
        frames = (pipeline.vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)
    assert 0.15 < frames.std() < 0.4 and 0.3 < frames.mean() < 0.7
    assert (frames[:, :, 1:] - frames[:, :, :-1]).abs().mean() > 0.01


def test_processes_that_create_it_at_the_same_time_leave_one_complete_folder(tmp_path, tiny_folders):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import tiny;"
        "print(tiny.ensure_tiny('t2v', Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(TINY.parent), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    assert all(code == 0 for *_, code in results), results
    (folder,) = tmp_path.iterdir()
    assert {out.strip().splitlines()[-1] for out, *_ in results} == {str(folder)}
    assert digest(folder) == digest(tiny_folders["t2v"])


def test_a_failed_build_leaves_nothing_behind(pack, tmp_path, monkeypatch):
    def fail(kind: str):
        raise RuntimeError("no")

    monkeypatch.setattr(pack.tiny, "build", fail)
    with pytest.raises(RuntimeError):
        pack.tiny.ensure_tiny("t2v", tmp_path)
    assert list(tmp_path.iterdir()) == []
