"""Write the README's pictures to docs/pictures/: the graph during a decode, the timings, and the seams of tiles.

Run it with `.venv/bin/python scripts/make_pictures.py` after `make browser`, when one of the three has changed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from comfyui_host import Host
from make_templates import PROMPTS, STOCK
from set_up import ROOT, comfyui_path, find_chromium
from web_ui import open_page

sys.path.insert(0, str(ROOT))
TARGET = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"
SIZE = "720x1280x121"
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Workflow.ShowMissingNodesWarning": False,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
SHOWN = 8
"""Amplification of differences: white is a difference of 255 / 8 levels."""


def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / "speed.svg").write_text(speed())
    seams().save(TARGET / "seams.png", optimize=True)
    graph(TARGET / "graph.png")
    core_graph(TARGET / "core_graph.png")


def graph(target: Path) -> None:
    """Write a screenshot of the text-to-video template in ComfyUI's web UI while its ranks decode."""
    settings = """
        const by = (type) => app.graph._nodes.find((node) => node.type === type);
        for (const [name, value] of [["width", 256], ["height", 160], ["frames", 61], ["steps", 4]])
          by("HV15Sampler").widgets.find((widget) => widget.name === name).value = value;
    """
    with tempfile.TemporaryDirectory(prefix="hv15-pictures-") as folder:
        decoding = "bars.every((bar) => 0.4 < bar.value && bar.value < 1)"
        screenshot(Host(Path(folder)), PROMPTS["text_to_video"], settings, decoding, 440, target)


def core_graph(target: Path) -> None:
    """Write a screenshot of ComfyUI's own text-to-video graph while its ranks sample, with small random models."""
    settings = """
        for (const [type, values] of Object.entries(%s))
          for (const node of app.graph._nodes.filter((node) => node.type === type && node.mode === 0))
            for (const [name, value] of Object.entries(values))
              node.widgets.find((widget) => widget.name === name).value = value;
    """
    values = {
        "EmptyHunyuanVideo15Latent": {"width": 640, "height": 480, "length": 33},
        "HV15RankGroup": {"devices": "cpu,cpu"},
    }
    with tempfile.TemporaryDirectory(prefix="hv15-pictures-") as folder:
        base = Path(folder)
        script = ROOT / "tests" / "host" / "small_core_models.py"
        subprocess.run([sys.executable, script, comfyui_path(), base / "models"], check=True)
        names = {"small_t2v": "hunyuanvideo1.5_720p_t2v_fp16", "full_size": "hunyuanvideo15_vae_fp16"}
        for path in list((base / "models").glob("*/*.safetensors")):
            path.rename(path.with_stem(names.get(path.stem, path.stem)))
        (base / "models" / "text_encoders").mkdir()
        for name in ("qwen_2.5_vl_7b_fp8_scaled", "byt5_small_glyphxl_fp16"):
            (base / "models" / "text_encoders" / f"{name}.safetensors").touch()
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "small_text_encoders.py").write_text(SMALL_TEXT_ENCODERS)
        sampling = "states.every((state) => /step ([3-9]|1\\d) of/.test(state.textContent))"
        screenshot(Host(base), next(iter(STOCK)), settings % json.dumps(values), sampling, 760, target)


SMALL_TEXT_ENCODERS = """
import nodes, torch

def encode(self, clip, text):
    text = torch.randn(1, 8, 3584, generator=torch.Generator().manual_seed(len(text)))
    return ([[text, {"pooled_output": torch.zeros(1, 768)}]],)

nodes.DualCLIPLoader.load_clip = lambda self, **options: (None,)
nodes.CLIPTextEncode.encode = encode
NODE_CLASS_MAPPINGS = {}
"""
"""A module for custom_nodes. The real text encoders have billions of weights."""


def screenshot(host: Host, template: str, settings: str, moment: str, height: int, target: Path) -> None:
    """Open a template, apply JavaScript `settings`, queue it, and take a picture.

    moment: a condition in JavaScript on the progress `bars` and the `states` of the ranks in the panel. height: of the
    picture, in pixels.
    """
    try:
        host.wait().post("/settings", SETTINGS)
        with open_page(find_chromium(), host.url) as page:
            page.open_template(template)
            page.run(
                """
                document.querySelector(".hv15\\\\.groups-tab-button").click();
                document.elementFromPoint(innerWidth - 32, 20).closest("button")?.click(); // the UI's advertisement
                """
                + settings
                + "await app.queuePrompt(0);"
            )
            bars, states = (
                f"[...document.querySelectorAll('.hv15-rank {part}')]" for part in ("progress", ".hv15-state")
            )
            page.until(f"((bars, states) => bars.length && {moment})({bars}, {states})", 300)
            page.run(
                """
                const nodes = app.graph._nodes.filter((node) => node.mode === 0 && !node.type.endsWith("Note"));
                const left = Math.min(...nodes.map((node) => node.pos[0]));
                const right = Math.max(...nodes.map((node) => node.pos[0] + node.size[0]));
                const top = Math.min(...nodes.map((node) => node.pos[1]));
                const ds = app.canvas.ds;
                ds.scale = (innerWidth - 410) / (right - left);
                ds.offset = [385 / ds.scale - left, 160 / ds.scale - top];
                app.canvas.draw(true, true);
                """
            )
            page.picture(target)
        with Image.open(target) as whole:
            whole.crop((0, 0, whole.width, height)).save(target, optimize=True)
    finally:
        host.close()


def speed() -> str:
    """Return an SVG chart of decode times in seconds, of this pack and others, from the results of `make bench`."""
    one, two = (json.loads((RESULTS / f"nvidia-h100-80gb-hbm3-x{n}.json").read_text()) for n in (1, 2))
    bars = [
        ("diffusers, tiled", one, "diffusers tiled", "#9aa4b2"),
        ("ComfyUI's own", one, "ComfyUI core", "#9aa4b2"),
        ("tiled, one GPU", one, "ours tiled", "#6ea8e0"),
        ("seamless, one GPU", one, "ours seamless", "#2f6fb5"),
        ("seamless, two GPUs", two, "ours seamless", "#2f6fb5"),
    ]
    seconds = [variant(report, name)["best_s"] for _, report, name, _ in bars]
    scale, row, left = 480 / max(seconds), 34, 150
    parts = []
    for index, ((label, _, _, color), value) in enumerate(zip(bars, seconds, strict=True)):
        y = 44 + index * row
        parts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="22" fill="{color}"/>')
        parts.append(f'<text x="{left + value * scale + 6:.1f}" y="{y + 16}">{value:.2f} s</text>')
    height = 60 + len(bars) * row
    title = f"VAE decode of {SIZE.replace('x', ' x ')}, {one['machine']}, bf16, {one['date']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-family="sans-serif" font-size="14">\n'
        f'<rect width="720" height="{height}" fill="#fff"/>\n<text x="12" y="26" font-weight="bold">{title}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def variant(report: dict, name: str) -> dict:
    """Return the measurements of a variant at `SIZE`."""
    return next(result for result in report["results"] if result["size"] == SIZE)["variants"][name]


def seams() -> Image.Image:
    """Return the difference of four ranks' frames from diffusers' untiled decode: tiled left, seamless right."""
    from benchmarks.decode import diffusers_vae
    from benchmarks.random_weights import TINY, decoder_tensors, random_latent
    from distributed import RankGroup

    latent, cpu = random_latent(1, 32, 3, 30, 53), torch.device("cpu")
    tensors = decoder_tensors(TINY, cpu)
    with torch.inference_mode():
        video = diffusers_vae(tensors, TINY, cpu, torch.float32).decode(latent).sample
    untiled = video.movedim(1, -1).add(1).div(2).clamp(0, 1)
    with tempfile.TemporaryDirectory(prefix="hv15-pictures-") as logs, RankGroup(["cpu"] * 4, logs=logs) as group:
        vae = {f"decoder.{name}": tensor for name, tensor in tensors.items()}
        decoded = [group.decode(latent, vae, mode) for mode in ("tiled", "seamless")]
    pictures = []
    for frames in decoded:
        levels = 255 * (frames - untiled)[0, -1].abs().amax(-1)
        print(f"largest difference {levels.max():.6f} of 255 levels")
        half = F.avg_pool2d(levels[None, None], 2)[0, 0]
        pictures.append(half.mul(SHOWN).clamp(0, 255).to(torch.uint8))
    gap = torch.full((pictures[0].shape[0], 8), 255, dtype=torch.uint8)
    return Image.fromarray(torch.cat([pictures[0], gap, pictures[1]], 1).numpy())


if __name__ == "__main__":
    main()
