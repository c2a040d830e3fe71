"""What a reader, an installer and ComfyUI find in the pack besides code."""

import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ("en", "zh")


def declared_nodes() -> set[str]:
    """Node ids, found as ComfyUI's Manager finds them: in the text."""
    return {
        id for file in (ROOT / "nodes").glob("*.py") for id in re.findall(r'node_id="(\w+)"', file.read_text("utf-8"))
    }


def test_the_readmes_python_example_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    spec = spec_from_file_location("hv15_tiny", ROOT / "nodes" / "tiny.py")
    tiny = module_from_spec(spec)
    spec.loader.exec_module(tiny)
    vae = tiny.ensure_tiny("t2v", tmp_path) / "vae"
    code = block.replace('"path/to/vae"', repr(str(vae)))
    assert code != block
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 9, 96, 128, 3])" in done.stdout


def test_requirements_are_those_of_the_project_and_leave_torch_alone():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if not line.startswith("#")]
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^dependencies = (\[.*\])$", project, re.MULTILINE)[1] == json.dumps(required)
    assert not any(re.match(r"torch\b", line) for line in required)


@pytest.mark.parametrize("locale", LOCALES)
def test_every_node_has_a_name_and_a_tooltip_for_each_input_in(locale):
    texts = json.loads((ROOT / "locales" / locale / "nodeDefs.json").read_text("utf-8"))
    english = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    assert set(texts) == declared_nodes() and len(texts) == 7
    for id, node in texts.items():
        assert node["display_name"] and node["description"]
        assert set(node["inputs"]) == set(english[id]["inputs"])
        assert all(text["tooltip"] for text in node["inputs"].values())


def test_the_english_texts_are_the_schemas(pack):
    """`python scripts/make_templates.py` writes them."""
    import importlib

    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    nodes = importlib.import_module(pack.vae.__package__).NODES
    for schema in (node.define_schema() for node in nodes):
        expected = {input.id: {"name": input.id, "tooltip": input.tooltip} for input in schema.inputs}
        assert texts[schema.node_id]["inputs"] == expected, schema.node_id
        assert texts[schema.node_id]["display_name"] == schema.display_name
        assert texts[schema.node_id]["description"] == schema.description


def test_every_node_is_found_by_the_words_that_people_search_for(pack):
    import importlib

    nodes = importlib.import_module(pack.vae.__package__).NODES
    aliases = {node.define_schema().node_id: getattr(node.define_schema(), "search_aliases", []) for node in nodes}
    without = [id for id, words in aliases.items() if "hunyuanvideo" not in words and id != "HV15Sampler"]
    assert without == []
    for word in ("multi gpu", "parallel", "vae decode"):
        assert sum(word in words for words in aliases.values()) >= 2, word


def test_the_names_of_inputs_are_chinese_in_the_chinese_texts():
    texts = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
    english = {name for node in texts.values() for id, text in node["inputs"].items() if (name := text["name"]) == id}
    assert english == set()


def test_every_node_has_a_help_page_that_names_each_input():
    english = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    for id in declared_nodes():
        for page in (f"{id}.md", f"{id}/zh.md"):
            text = (ROOT / "web" / "docs" / page).read_text("utf-8")
            assert all(f"`{name}`" in text for name in english[id]["inputs"]), page


def test_importing_the_ranks_half_brings_in_neither_comfyui_nor_diffusers():
    code = "import sys, distributed; bad = {'comfy', 'nodes', 'diffusers', 'torch_npu'} & set(sys.modules); print(bad)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_no_folder_of_examples_lacks_a_picture():
    for graph in (ROOT / "example_workflows").glob("*.json"):
        assert graph.with_suffix(".jpg").stat().st_size > 1000
