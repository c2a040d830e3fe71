"""Write the README's pictures to docs/pictures/: graphs at work, the timings, the seams of tiles, and prompts.

Run it with `.venv/bin/python scripts/make_pictures.py` after `make browser`, when one of them has changed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from comfyui_host import Host
from make_templates import PROMPTS, STOCK
from set_up import ROOT, find_chromium
from web_ui import open_page

sys.path.insert(0, str(ROOT))
from miniature import footage, parts
from miniature.training.recipe import Recipe
from miniature.training.report import Studio, picture

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
SHOWN_PROMPTS = (
    footage.CAPTIONS[0],
    "a pink star moves right in front of a night sky",
    "a yellow circle moves left in front of a dark sea",
    "a blue square moves right in front of a brick wall",
    "a green triangle moves up in front of a wooden floor",
    'a white cross stands still in front of a grey road with the letter "K"',
)
"""One of Big Buck Bunny and five of the world of shapes."""
SHOWN = 20
"""Amplification of differences: white is a difference of 255 / 20 levels or more."""


def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / "speed.svg").write_text(speed())
    seams().save(TARGET / "seams.png", optimize=True)
    prompts().save(TARGET / "prompts.png", optimize=True)
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
        subprocess.run([sys.executable, "-m", "tests.host.small_core_models", base / "models"], check=True, cwd=ROOT)
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
    """Return frames of Big Buck Bunny: the original, and four ranks' decodes in seamless mode and with two tile sizes.

    Below each frame are a magnified part, and the difference from diffusers' untiled decode.
    """
    from benchmarks import quality
    from distributed import RankGroup

    original = quality.clip(480, 848, 5)
    latent, weights, untiled = quality.reference(original)
    clips = [original]
    with tempfile.TemporaryDirectory(prefix="hv15-pictures-") as logs, RankGroup(["cpu"] * 4, logs=logs) as group:
        clips += [
            group.decode(latent, weights, **decode)[0].clone()
            for decode in (quality.SEAMLESS, quality.TILED, quality.UNBLENDED)
        ]
    titles = ["Original", "Seamless", "Tiled: 256 pixels, overlap 64 (default)", "Tiled: 128 pixels, no overlap"]
    figures = [quality.compare(frames, untiled, original) for frames in clips]
    return seam_sheet(titles, figures, [frames[-1] for frames in clips], untiled[-1])


def seam_sheet(
    titles: list[str], figures: list[dict], frames: list[torch.Tensor], untiled: torch.Tensor
) -> Image.Image:
    """Return a sheet with one column per frame [height, width, 3] from 0 to 1: the original first, seamless second.

    The magnified part is where the last frame differs most from the second.
    """
    width, gap, zoom, text = 420, 6, 4, 92
    height = round(width * untiled.shape[0] / untiled.shape[1])
    rows, columns = 72, width // zoom
    differences = (frames[-1] - frames[1]).abs().mean(-1)[None, None]
    sums = F.avg_pool2d(differences, (rows, columns), stride=1)[0, 0]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    tops = text, text + height + gap, text + height + rows * zoom + 2 * gap
    sheet = Image.new("RGB", (len(frames) * (width + gap) - gap, tops[-1] + height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(20)
    for index, (title, row, frame) in enumerate(zip(titles, figures, frames, strict=True)):
        x = index * (width + gap)
        image, scale = picture(frame), width / frame.shape[1]
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (x, tops[0]))
        part = image.crop((left, top, left + columns, top + rows))
        sheet.paste(part.resize((width, rows * zoom), Image.Resampling.NEAREST), (x, tops[1]))
        corners = [(left, top), (left + columns, top + rows)]
        draw.rectangle([(x + a * scale, tops[0] + b * scale) for a, b in corners], outline="white", width=2)
        lines = [title]
        if index:
            levels = SHOWN * (frame - untiled).abs().amax(-1, keepdim=True)
            difference = picture(levels.clamp(0, 1).expand_as(frame))
            sheet.paste(difference.resize((width, height), Image.Resampling.BOX), (x, tops[2]))
            for name, of in (("untiled decode", "untiled"), ("original", "original")):
                decibels = row[f"psnr_{of}"]
                lines.append(f"{name}: {'over ' * (decibels >= 120)}{decibels:.4g} dB, SSIM {row[f'ssim_{of}']:.4f}")
        else:
            lines += ["Right: PSNR and SSIM against diffusers'", "untiled decode and against the original"]
            note = (
                f"Above: the marked part, magnified {zoom} times\n\n"
                f"Right: difference from diffusers' untiled\ndecode, amplified {SHOWN} times\n\n"
                "Big Buck Bunny, (c) copyright 2008,\nBlender Foundation, www.bigbuckbunny.org,\nCC BY 3.0"
            )
            draw.multiline_text((x + 4, tops[2] + 4), note, "black", spacing=6)
        draw.multiline_text((x + 4, 4), "\n".join(lines), "black", spacing=6)
    return sheet


def prompts() -> Image.Image:
    """Return frames of a video of the miniature for each of `SHOWN_PROMPTS`, in two columns, with the prompt above."""
    studio = Studio(parts.WEIGHTS, "t2v", Recipe(), torch.device("cpu"))
    text, gap, shown = 26, 8, (0, 5, 11, 16)
    height, width = studio.bucket.size
    cell = (width // 2 * len(shown), height // 2 + text)
    rows = len(SHOWN_PROMPTS) // 2
    sheet = Image.new("RGB", (2 * cell[0] + gap, rows * (cell[1] + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(15)
    for index, prompt in enumerate(SHOWN_PROMPTS):
        x, y = index % 2 * (cell[0] + gap), index // 2 * (cell[1] + gap)
        strip = picture(torch.cat(list(studio.video(prompt, 1, parts.GUIDANCE)[list(shown)]), dim=1))
        sheet.paste(strip.resize((cell[0], cell[1] - text), Image.Resampling.LANCZOS), (x, y + text))
        draw.text((x + 2, y + 3), prompt, "black")
    return sheet


if __name__ == "__main__":
    main()
