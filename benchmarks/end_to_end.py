"""Measure whole prompts in a headless ComfyUI, from text to frames: with this pack's nodes, and with ComfyUI's own.

    python -m benchmarks.end_to_end

The models are full size with random weights, in temporary files. The variants are this pack's text, sampler and decode
nodes with one rank and with one rank per GPU, ComfyUI's own nodes on one GPU, and the same nodes with Distribute Model
and Distribute VAE on all GPUs. All encode the same texts with the same vocabulary, and sample with guidance 6. Each
variant runs two prompts, with different positive texts and seeds. Models stay on the GPU as long as there is room: with
this pack's nodes by offload `none`, with ComfyUI's by default. The first prompt loads models, starts ranks and compiles
kernels, so it has 2 steps only. The second, with all steps, is the one to compare. ComfyUI's loading nodes move weights
to the GPU only when another node needs them. Each row has the seconds of each stage, their total from text to frames,
and the seconds of saving the video after that.

The files of this pack's variants are replaced by ComfyUI's before the others run, in a new process. Both read the same
text encoders. The files need 36 GiB at most in the temporary folder (TMPDIR). Without a GPU the model is the tiny
built-in one, and the run is only a functional test. ComfyUI's variants are left out there, because its loader only
knows text encoders of full size. Writes JSON and a Markdown table.
"""

import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.core_graph import (
    device_lists,
    new_report,
    parser_for,
    run_prompt,
    running_host,
    save_vae,
    write,
)
from benchmarks.core_sampling import SIZES, random_transformer
from benchmarks.decode import ROOT, target
from benchmarks.random_weights import random_tensors
from distributed.denoise.layout import Architecture
from distributed.safetensors_files import Shapes

sys.path.append(str(ROOT / "scripts"))
from comfyui_host import Host
from set_up import comfyui_path

OURS, CORE, DISTRIBUTED = "this pack's", "core's", "core's, distributed"
STAGES = {
    "loading": ("pipeline", "unet", "clip", "vae", "ranks", "model_on_ranks", "vae_on_ranks"),
    "text encoding": ("text", "positive", "negative"),
    "denoising": ("latent", "shift", "guider", "noise", "sampler", "sigmas", "sample"),
    "decoding": ("decode",),
}
"""Nodes of each stage, by their ids in the graphs of api_prompts."""
SAVING = ("video", "save")
FIRST_STEPS = 2
NAME = "HunyuanVideo-1.5-480p_t2v-random"
FILES = {
    "unet_name": "transformer.safetensors",
    "clip_name1": "qwen.safetensors",
    "clip_name2": "byt5.safetensors",
    "vae_name": "vae.safetensors",
}
"""Names of the files in ComfyUI's layout, by the inputs of its loaders."""
TEXT_ENCODERS = {"text_encoder": FILES["clip_name1"], "text_encoder_2": FILES["clip_name2"]}
"""Folders of the text encoders in a pipeline, and the names of the same files for ComfyUI."""


def text_encoders() -> dict[str, tuple[object, Shapes]]:
    """Return each text encoder's config and the shapes of its tensors, by its folder in a pipeline.

    The names of tensors are those of ComfyUI's files. transformers reads them too, and ignores the vision part.
    """
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    language = Qwen2_5_VLTextConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        rope_theta=1000000.0,
        rope_scaling={"rope_type": "default", "mrope_section": [16, 24, 24]},
    )
    glyphs = T5Config(
        vocab_size=1510,
        d_model=1472,
        d_kv=64,
        d_ff=3584,
        num_layers=12,
        num_heads=6,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        parts = {
            "model.": Qwen2_5_VLTextModel(language),
            "visual.": Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(hidden_size=1280)),
            "": T5EncoderModel(glyphs),
        }
    shapes = {
        prefix: {prefix + name: tuple(weight.shape) for name, weight in part.named_parameters()}
        for prefix, part in parts.items()
    }
    return {
        "text_encoder": (language, shapes["model."] | shapes["visual."]),
        "text_encoder_2": (glyphs, shapes[""]),
    }


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors, which may be on the GPU, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})


def save_pipeline(models: Path, device: torch.device) -> None:
    """Write a text-to-video pipeline of the real widths (Tencent's 480p checkpoint), bfloat16, in diffusers' format."""
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
    from transformers import Qwen2Tokenizer

    from miniature import parts

    folder, architecture = models / "diffusers" / NAME, Architecture()
    pipeline = parts.pipeline("t2v")
    vocabulary = comfyui_path() / "comfy" / "text_encoders" / "qwen25_tokenizer"
    pipeline.register_modules(tokenizer=Qwen2Tokenizer.from_pretrained(vocabulary))
    pipeline.save_pretrained(folder)  # all parts with weights are replaced below
    with device:
        vae = AutoencoderKLHunyuanVideo15()
    vae.bfloat16().save_pretrained(folder / "vae")
    with torch.device("meta"):
        HunyuanVideo15Transformer3DModel(task_type="t2v", **architecture.config).save_config(folder / "transformer")
    weights = random_tensors(architecture.shapes(), device, torch.bfloat16)
    save_weights(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    del weights
    for part, (config, shapes) in text_encoders().items():
        config.save_pretrained(folder / part)
        save_weights(random_tensors(shapes, device, torch.bfloat16), folder / part / "model.safetensors")


def replace_by_core_files(models: Path, device: torch.device) -> None:
    """Write a transformer and a VAE of the same sizes, float16, in ComfyUI's layout. Link the pipeline's text encoders.

    The pipeline's transformer is deleted before.
    """
    shutil.rmtree(models / "diffusers" / NAME / "transformer")
    weights = random_transformer(Architecture(), device)
    save_weights(weights, models / "diffusion_models" / FILES["unet_name"])
    save_vae(models / "vae" / FILES["vae_name"], device)
    (models / "text_encoders").mkdir()
    for part, name in TEXT_ENCODERS.items():
        (models / "text_encoders" / name).symlink_to(models / "diffusers" / NAME / part / "model.safetensors")


def our_graph() -> dict:
    """Return the prompt of this pack's nodes."""
    return json.loads((ROOT / "api_prompts" / "text_to_video.json").read_text())


def core_graph(distributed: bool) -> dict:
    """Return the prompt of ComfyUI's own nodes, with Distribute Model and Distribute VAE or without."""
    prompt = json.loads((ROOT / "api_prompts" / "core_text_to_video.json").read_text())
    for node in prompt.values():
        node["inputs"] |= {name: file for name, file in FILES.items() if name in node["inputs"]}
    prompt["positive"]["inputs"]["text"] = our_graph()["text"]["inputs"]["positive"]
    if not distributed:
        for name, kind in (("model_on_ranks", "model"), ("vae_on_ranks", "vae")):
            source = prompt.pop(name)["inputs"][kind]
            for node in prompt.values():
                node["inputs"] |= {key: source for key, value in node["inputs"].items() if value == [name, 0]}
        del prompt["ranks"]
    return prompt


def graph(nodes: str, devices: str, size: str, steps: int, number: int) -> dict:
    """Return a prompt. number: part of its seed and its positive text, so that ComfyUI's cache has neither result."""
    width, height, frames = SIZES[size]
    prompt = our_graph() if nodes == OURS else core_graph(distributed=nodes == DISTRIBUTED)
    inputs = {name: node["inputs"] for name, node in prompt.items()}
    if "ranks" in inputs:
        inputs["ranks"]["devices"] = devices
    if nodes == OURS:
        if torch.cuda.is_available():
            inputs["pipeline"] |= {"model": NAME, "offload": "none"}
        inputs["text"]["positive"] += f" Version {number}."
        settings = {"width": width, "height": height, "frames": frames, "steps": steps, "seed": number}
        inputs["sampler"] |= settings
    else:
        inputs["positive"]["text"] += f" Version {number}."
        inputs["latent"] |= {"width": width, "height": height, "length": frames}
        inputs["sigmas"]["steps"] = steps
        inputs["noise"]["noise_seed"] = number
    return prompt


def measure(host: Host, prompt: dict) -> dict[str, float]:
    """Run one prompt and return the seconds of its stages. Raises RuntimeError if the prompt fails."""
    run = run_prompt(host, prompt)
    stages = {stage: sum(run.seconds.get(name, 0) for name in names) for stage, names in STAGES.items()}
    saving = sum(run.seconds.get(name, 0) for name in SAVING)
    times = stages | {"total": sum(stages.values()), "saving": saving}
    return {name: round(seconds, 2) for name, seconds in times.items()}


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--steps", type=int, default=50, help="of the second prompt")
    options = parser.parse_args()
    device, _, _ = target(0)
    full, (one, every) = torch.cuda.is_available(), device_lists()
    sizes = (options.sizes or ("480x848x33" if full else "64x96x9")).split(",")
    prompts = {"first": min(FIRST_STEPS, options.steps), "second": options.steps}
    report = new_report(f"python -m benchmarks.end_to_end --sizes {','.join(sizes)} --steps {options.steps}", device)
    sets = [(save_pipeline, [(OURS, devices) for devices in dict.fromkeys((one, every))])]
    if full:
        sets.append((replace_by_core_files, [(CORE, one), (DISTRIBUTED, every)]))
    with tempfile.TemporaryDirectory(prefix="hv15-end-to-end-") as folder:
        base = Path(folder)
        for save, variants in sets:
            if full:
                save(base / "models", device)
                torch.cuda.empty_cache()
            with running_host(base, options.host_options) as host:
                for nodes, devices in variants:
                    for size, (prompt, steps) in itertools.product(sizes, prompts.items()):
                        row = {"size": size, "nodes": nodes, "devices": devices, "prompt": prompt, "steps": steps}
                        row |= measure(host, graph(nodes, devices, size, steps, len(report["rows"])))
                        print(row, flush=True)
                        report["rows"].append(row)
                        write(report, options.out, "end-to-end", "seconds")  # an interrupted run keeps its rows
                    host.stop_groups()


if __name__ == "__main__":
    main()
