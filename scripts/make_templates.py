"""Write example_workflows/: the API prompts as graphs, and ComfyUI's own HunyuanVideo-1.5 graphs on ranks.

A thumbnail shows the graph and frames of a video of the built-in model. Run it when a prompt, a node's inputs or the
built-in model have changed.
"""

import json
import sys
import tempfile
import uuid
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from comfyui_host import Host
from set_up import ROOT

TARGET = ROOT / "example_workflows"
PROMPTS = {
    "text_to_video": "Text to video on several GPUs",
    "image_to_video": "Image to video on several GPUs",
    "decode_saved_latent": "Decode a saved latent on several GPUs",
}
"""Names of the templates by API prompt. The template browser shows the file's name."""
STOCK = {
    "ComfyUI text to video on several GPUs": "video_hunyuan_video_1.5_720p_t2v.json",
    "ComfyUI image to video on several GPUs": "video_hunyuan_video_1.5_720p_i2v.json",
}
VIDEOS = {
    "Text to video on several GPUs": ("text_to_video", {}),
    "Image to video on several GPUs": ("image_to_video", {}),
    "Decode a saved latent on several GPUs": (
        "text_to_video",
        {"text": {"positive": "a yellow circle moves left in front of a dark sea"}},
    ),
    "ComfyUI text to video on several GPUs": (
        "text_to_video",
        {"text": {"positive": "a pink star moves right in front of a night sky"}, "sampler": {"seed": 2}},
    ),
    "ComfyUI image to video on several GPUs": (
        "image_to_video",
        {
            "text": {"positive": "a red square moves up in front of a grey road"},
            "square": {"color": 0xEB1A14},
            "image": {"x": 96, "y": 80},
        },
    ),
}
"""The video in each template's thumbnail: an API prompt, and what is changed in its nodes' inputs."""
NOTES = ("Note", "MarkdownNote")
THUMBNAIL, STRIP, EDGE, TITLE = (640, 400), 133, 16, 30
"""Width and height of a thumbnail, height of its frames, its margin, and the height of a node's title, in pixels."""
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, ROW = 380, 60
STEP = 24
"""Distance of two widgets of a node in pixels."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="hv15-templates-") as folder:
        host = Host(Path(folder))
        try:
            info = host.wait().get("/object_info")
            strips = {title: strip(host, *video) for title, video in VIDEOS.items()}
        finally:
            host.close()
    for name, title in PROMPTS.items():
        prompt = json.loads((ROOT / "api_prompts" / f"{name}.json").read_text())
        prompt["ranks"]["inputs"]["devices"] = "auto"
        write(title, graph_of(name, prompt, info), strips[title])
    stock = Path(find_spec("comfyui_workflow_templates_media_video").origin).parent / "templates"
    for title, file in STOCK.items():
        write(title, distributed(json.loads((stock / file).read_text()), info), strips[title])


def write(name: str, graph: dict, frames: Image.Image) -> None:
    """Write a template and its thumbnail: the frames of its video above the graph."""
    (TARGET / f"{name}.json").write_text(json.dumps(graph, indent=1) + "\n")
    picture = Image.new("RGB", THUMBNAIL)
    picture.paste(frames)
    picture.paste(drawing(graph, (THUMBNAIL[0], THUMBNAIL[1] - STRIP)), (0, STRIP))
    picture.save(TARGET / f"{name}.jpg", quality=90)
    print(TARGET / f"{name}.json", file=sys.stderr)


def strip(host: Host, name: str, changes: dict[str, dict]) -> Image.Image:
    """Run an API prompt with other inputs, and return the first, the middle and the last frame side by side."""
    prompt = json.loads((ROOT / "api_prompts" / f"{name}.json").read_text())
    for node, inputs in changes.items():
        prompt[node]["inputs"] |= inputs
    prompt["frames"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "strips/s"}}
    run = host.run(prompt)
    if run.error:
        raise SystemExit(f"{run.error['node_type']} failed: {run.error['exception_message']}")
    frames = host.pictures(run, "frames")
    picture, width = Image.new("RGB", (THUMBNAIL[0], STRIP)), THUMBNAIL[0] // 3
    for place, index in enumerate((0, len(frames) // 2, -1)):
        picture.paste(
            Image.fromarray(frames[index]).resize((width, STRIP), Image.Resampling.LANCZOS), (place * width, 0)
        )
    return picture


def drawing(graph: dict, size: tuple[int, int]) -> Image.Image:
    """Return a picture of a graph: its nodes where they are, this pack's nodes highlighted, and its links."""
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in graph["nodes"] if node["type"] not in NOTES}
    left, top = min(x for x, *_ in boxes.values()), min(y for _, y, *_ in boxes.values()) - TITLE
    right, bottom = max(x + w for x, _, w, _ in boxes.values()), max(y + h for _, y, _, h in boxes.values())
    scale = min((size[0] - 2 * EDGE) / (right - left), (size[1] - 2 * EDGE) / (bottom - top))
    across = (size[0] - scale * (right - left)) / 2
    down = (size[1] - scale * (bottom - top)) / 2

    def place(x: float, y: float) -> tuple[float, float]:
        return across + scale * (x - left), down + scale * (y - top)

    names = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    picture = Image.new("RGB", size, "#1b1b1f")
    draw = ImageDraw.Draw(picture)
    for _, source, _, target, slot, _ in graph["links"]:
        if source in boxes and target in boxes:
            (x, y, w, _), (to_x, to_y, _, _) = boxes[source], boxes[target]
            draw.line([place(x + w, y + STEP / 2), place(to_x, to_y + STEP * (slot + 0.5))], "#6f7480", width=2)
    for node in graph["nodes"]:
        if node["id"] in boxes:
            x, y, w, h = boxes[node["id"]]
            own = node["type"].startswith("HV15")
            corners = [place(x, y - TITLE), place(x + w, y + h)]
            draw.rounded_rectangle(corners, radius=4, fill="#7a4fd0" if own else "#3a3d45", outline="#9aa0ac")
            title = node.get("title") or names.get(node["type"], {}).get("display_name", node["type"])
            width = corners[1][0] - corners[0][0] - 8
            font = ImageFont.load_default(min(18, max(7, 22 * scale)))
            while title and draw.textlength(title, font) > width:
                title = title[:-1]
            draw.text((corners[0][0] + 4, corners[0][1] + 2), title, "white", font)
    return picture


def graph_of(name: str, prompt: dict, info: dict) -> dict:
    """Return an API prompt as a graph for the web UI, laid out from left to right."""
    graph_id = str(uuid.uuid5(uuid.NAMESPACE_OID, name))
    ids = {key: number for number, key in enumerate(prompt, 1)}
    nodes = {key: empty_node(ids[key], node["class_type"], info, node["inputs"]) for key, node in prompt.items()}
    links: list[list] = []
    for key, node in prompt.items():
        for input, value in node["inputs"].items():
            if isinstance(value, list):
                connect(links, nodes[value[0]], value[1], nodes[key], input)
    lay_out(prompt, nodes)
    return {
        "id": graph_id,
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def empty_node(id: int, type: str, info: dict, values: dict) -> dict:
    """Return a node with all sockets and widget values, without connections."""
    about = info[type]
    sockets, widgets, widget_values = [], [], []
    for part in ("required", "optional"):
        for name, (kind, *options) in ((name, spec) for name, spec in about["input"].get(part, {}).items()):
            options = options[0] if options else {}
            if isinstance(kind, list):
                kind, default = "COMBO", kind[0] if kind else ""
            else:
                default = options.get("default", next(iter(options.get("options", ())), None))
            if kind not in WIDGETS:
                sockets.append(
                    {"name": name, "type": kind, "link": None} | ({"shape": 7} if part == "optional" else {})
                )
                continue
            widgets.append({"name": name, "type": kind, "widget": {"name": name}, "link": None})
            widget_values.append(values.get(name, default))
            if options.get("control_after_generate"):
                widget_values.append("fixed")
    outputs = [
        {"name": name, "type": kind, "links": []}
        for name, kind in zip(about["output_name"], about["output"], strict=True)
    ]
    height = 40 + STEP * (max(len(sockets), len(outputs)) + len(widget_values)) + 60 * ("positive" in values)
    return {
        "id": id,
        "type": type,
        "pos": [0, 0],
        "size": [320, height],
        "flags": {},
        "order": id - 1,
        "mode": 0,
        "inputs": sockets + widgets,
        "outputs": outputs,
        "properties": {"Node name for S&R": type},
        "widgets_values": widget_values,
    }


def connect(links: list[list], source: dict, output: int, target: dict, name: str, id: int | None = None) -> None:
    """Connect an output of a node to the input `name` of another."""
    slot = next(index for index, socket in enumerate(target["inputs"]) if socket["name"] == name)
    id = id or len(links) + 1
    source["outputs"][output]["links"].append(id)
    target["inputs"][slot]["link"] = id
    links.append([id, source["id"], output, target["id"], slot, source["outputs"][output]["type"]])


def lay_out(prompt: dict, nodes: dict[str, dict]) -> None:
    """Place each node in the column of its longest path from a node without inputs."""

    def depth(key: str) -> int:
        return max((1 + depth(v[0]) for v in prompt[key]["inputs"].values() if isinstance(v, list)), default=0)

    bottoms: dict[int, int] = {}
    for order, key in enumerate(sorted(prompt, key=depth)):
        column, node = depth(key), nodes[key]
        node["pos"] = [column * COLUMN, bottoms.get(column, 0)]
        bottoms[column] = node["pos"][1] + node["size"][1] + ROW
        node["order"] = order


def below(nodes: Iterable[dict], left: float, width: float) -> float:
    """Return the y coordinate below all nodes that overlap the column at `left`."""
    column = [node for node in nodes if node["pos"][0] < left + width and left < node["pos"][0] + node["size"][0]]
    return max((node["pos"][1] + node["size"][1] for node in column), default=0) + ROW


def distributed(graph: dict, info: dict) -> dict:
    """Insert Distribute Model and Distribute VAE after the loaders of a graph of core's nodes. Return the graph.

    Encoding stays with the loader's VAE. A loader that is bypassed gets a bypassed node.
    """
    nodes = {node["id"]: node for node in graph["nodes"]}
    decoders = {node["id"] for node in nodes.values() if node["type"] in ("VAEDecode", "VAEDecodeTiled")}
    ranks = _add(graph, "HV15RankGroup", info, nodes)
    for loader in sorted(nodes.values(), key=lambda node: node["mode"]):  # bypassed ones last
        if loader["type"] == "UNETLoader":
            _insert(graph, loader, _add(graph, "HV15DistributeModel", info, nodes), "model", ranks)
        elif loader["type"] == "VAELoader":
            _insert(graph, loader, _add(graph, "HV15DistributeVAE", info, nodes), "vae", ranks, decoders)
    return graph


def _add(graph: dict, kind: str, info: dict, nodes: dict[int, dict]) -> dict:
    """Add a node to the left of the graph's loaders, below the nodes that are there."""
    added = empty_node(graph["last_node_id"] + 1, kind, info, {})
    left = min(node["pos"][0] for node in nodes.values() if node["type"].endswith("Loader")) - COLUMN
    added["pos"] = [left, below(graph["nodes"], left, added["size"][0])]
    added["order"] = len(nodes)
    graph["nodes"].append(added)
    graph["last_node_id"] += 1
    return added


def _insert(
    graph: dict, loader: dict, ours: dict, name: str, ranks: dict, targets: Collection[int] | None = None
) -> None:
    """Put a node between a loader and the nodes that use its first output. targets: only these nodes."""
    ours["mode"] = loader["mode"]
    for link in graph["links"]:
        if link[1] == loader["id"] and (targets is None or link[3] in targets):
            loader["outputs"][0]["links"].remove(link[0])
            link[1], link[2] = ours["id"], 0
            ours["outputs"][0]["links"].append(link[0])
    for source, input in ((loader, name), (ranks, "rank_group")):
        graph["last_link_id"] += 1
        connect(graph["links"], source, 0, ours, input, graph["last_link_id"])


if __name__ == "__main__":
    main()
