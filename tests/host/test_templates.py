"""The graphs in example_workflows, compared with the nodes of a real ComfyUI."""

import copy
import json
from pathlib import Path

import pytest

from make_templates import PROMPTS, STOCK

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
NOTES = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem)
def template(request) -> dict:
    return json.loads(request.param.read_text())


def test_every_node_exists(host, template):
    info = host.get("/object_info")
    assert [n["type"] for n in template["nodes"] if n["type"] not in info and n["type"] not in NOTES] == []


def test_our_nodes_overlap_no_other_nodes(template):
    title = 30  # pixels above a node's position

    def box(node):
        (x, y), (width, height) = node["pos"], node["size"]
        return x, y - title, x + width, y + height

    for ours in (node for node in template["nodes"] if node["type"].startswith("HV15")):
        left, top, right, bottom = box(ours)
        for other in template["nodes"]:
            x, y, end_x, end_y = box(other)
            separate = right <= x or end_x <= left or bottom <= y or end_y <= top
            assert other is ours or separate, f"{ours['type']} overlaps {other['type']}"


def test_links_agree_with_the_sockets_on_both_ends(template):
    nodes = {node["id"]: node for node in template["nodes"]}
    ids = set()
    for id, source, output, target, slot, kind in template["links"]:
        assert id in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == id
        assert kind == nodes[source]["outputs"][output]["type"]
        ids.add(id)
    used = {socket["link"] for node in nodes.values() for socket in node.get("inputs", []) if socket.get("link")}
    assert used == ids and max(ids) <= template["last_link_id"] and max(nodes) <= template["last_node_id"]


def test_our_nodes_have_their_current_inputs_and_outputs(host, template):
    info = host.get("/object_info")
    ours = [node for node in template["nodes"] if node["type"].startswith("HV15")]
    assert ours
    for node in ours:
        about = info[node["type"]]
        specs = {**about["input"].get("required", {}), **about["input"].get("optional", {})}
        assert {socket["name"] for socket in node["inputs"]} == set(specs)
        assert [socket["type"] for socket in node["outputs"]] == about["output"]
        extra = sum(bool(spec[1].get("control_after_generate")) for spec in specs.values())
        assert len(node["widgets_values"]) == sum("widget" in socket for socket in node["inputs"]) + extra


def test_in_cores_graphs_every_decode_node_decodes_on_ranks():
    core = [path for path in TEMPLATES if path.stem in STOCK]
    assert len(core) == 2
    for path in core:
        graph = json.loads(path.read_text())
        types = {node["id"]: node["type"] for node in graph["nodes"]}
        into = [(types[link[1]], types[link[3]]) for link in graph["links"] if link[5] == "VAE"]
        assert ("VAELoader", "HV15DistributeVAE") in into
        decoders = [source for source, target in into if target in ("VAEDecode", "VAEDecodeTiled")]
        assert decoders and set(decoders) == {"HV15DistributeVAE"}


def test_a_template_runs(host, prompt):
    """With the graph's values, read as the web UI reads them, at a small size."""
    graph = json.loads((ROOT / "example_workflows" / f"{PROMPTS['text_to_video']}.json").read_text())
    run = host.run(shrink(as_prompt(graph)))
    assert run.error is None, run.error["exception_message"]


def as_prompt(graph: dict) -> dict:
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        inputs, values = {}, iter(node["widgets_values"])
        for socket in node["inputs"]:
            if "widget" in socket:
                inputs[socket["name"]] = next(values)
                if socket["name"] == "seed":
                    next(values)
            elif socket["link"]:
                inputs[socket["name"]] = sources[socket["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def shrink(prompt: dict) -> dict:
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] == "HV15Sampler":
            node["inputs"] |= {"width": 96, "height": 64, "frames": 5, "steps": 2}
    return prompt
