"""Generate the English locale and the tables of the help pages from the nodes' schemas.

    .venv/bin/python scripts/make_texts.py

A tooltip is written once, in the schema (nodes/*.py). Its Chinese translation is written once, in
locales/zh/nodeDefs.json. This script copies both to `locales/en/nodeDefs.json` and to the title and the table in
`web/docs/<node_id>.md` and `web/docs/<node_id>/zh.md`. The prose of a help page is not changed. A test compares the
files with the output of this script.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from set_up import ROOT, comfyui_path

HEADINGS = {"en": ("input", "output", "meaning"), "zh": ("输入", "输出", "含义")}
PACK = "hv15_pack_for_texts"


def load_pack() -> ModuleType:
    """Import the pack's `nodes` as ComfyUI does, on the CPU."""
    path = str(comfyui_path())
    sys.path.insert(0, path)  # before the pack's own folder, which has a module `nodes` too
    from comfy.cli_args import args

    args.cpu = True
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module(f"{PACK}.nodes")


def english(nodes: list[type]) -> dict:
    """Return the content of locales/en/nodeDefs.json: names and tooltips of all nodes, inputs and outputs."""
    return {schema.node_id: node_texts(schema) for schema in (node.define_schema() for node in nodes)}


def node_texts(schema: object) -> dict:
    """Return the texts of one node."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
        "outputs": {
            str(index): {"name": output.display_name or output.io_type, "tooltip": output.tooltip}
            for index, output in enumerate(schema.outputs)
        },
    }


def page_with_table(page: str, texts: dict, language: str) -> str:
    """Return a help page with its own prose, and with the title and the table of these texts."""
    prose = [line for line in page.splitlines()[1:] if not line.startswith("|")]
    return f"# {texts['display_name']}\n\n" + "\n".join(prose).strip() + "\n\n" + table(texts, language)


def table(texts: dict, language: str) -> str:
    """Return a Markdown table of a node's inputs and outputs."""
    input, output, meaning = HEADINGS[language]
    lines = [f"| {input} | {meaning} |", "| --- | --- |"]
    for id, text in texts["inputs"].items():
        name = f"`{id}`" if text["name"] == id else f"`{id}` {text['name']}"
        lines.append(f"| {name} | {text['tooltip']} |")
    lines += [f"| **{output}** | |"]
    lines += [f"| {text['name']} | {text['tooltip']} |" for text in texts["outputs"].values()]
    return "\n".join(lines) + "\n"


def generated(nodes: list[type]) -> dict[Path, str]:
    """Return the content of every generated file, by its path."""
    texts = {"en": english(nodes)}
    texts["zh"] = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
    files = {ROOT / "locales" / "en" / "nodeDefs.json": json.dumps(texts["en"], indent=2, ensure_ascii=False) + "\n"}
    for id in texts["en"]:
        for language, page in (("en", f"{id}.md"), ("zh", f"{id}/zh.md")):
            path = ROOT / "web" / "docs" / page
            files[path] = page_with_table(path.read_text("utf-8"), texts[language][id], language)
    return files


if __name__ == "__main__":
    for path, text in generated(load_pack().NODES).items():
        path.write_text(text, "utf-8")
