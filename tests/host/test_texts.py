"""Names, tooltips and help pages in English and Chinese, and the tests that the reliability page names."""

import json
import re
from pathlib import Path

import make_texts
import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONS_AND_NUMBERS = re.compile(r"(?:(?<=^)|(?<=[.] ))[a-z_]+(?=: )|\d+")


def locale(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))


def test_locales_and_help_pages_agree_with_the_schemas(pack):
    """`python scripts/make_texts.py` writes them."""
    files = make_texts.generated(pack.nodes.NODES)
    assert len(files) == 1 + 2 * len(pack.nodes.NODES)
    for path, text in files.items():
        assert path.read_text("utf-8") == text, path


def test_every_input_and_output_has_a_name_and_a_tooltip_in_both_languages(pack):
    english, chinese = locale("en"), locale("zh")
    assert set(english) == set(chinese) == {node.define_schema().node_id for node in pack.nodes.NODES}
    for id, texts in english.items():
        for language in (texts, chinese[id]):
            assert language["display_name"] and language["description"]
            for part in ("inputs", "outputs"):
                assert set(language[part]) == set(texts[part]), (id, part)
                assert all(text["name"] and text["tooltip"] for text in language[part].values()), (id, part)


def test_input_names_are_translated_in_the_chinese_texts():
    english = {
        name for node in locale("zh").values() for id, text in node["inputs"].items() if (name := text["name"]) == id
    }
    assert english == set()


def test_a_chinese_tooltip_has_the_options_and_numbers_of_the_english_one():
    chinese = locale("zh")
    for id, texts in locale("en").items():
        for name, text in texts["inputs"].items():
            missing = [
                word
                for word in OPTIONS_AND_NUMBERS.findall(text["tooltip"])
                if word not in chinese[id]["inputs"][name]["tooltip"]
            ]
            assert missing == [], (id, name)


def test_every_test_that_the_reliability_page_names_exists():
    """A name that ends in "…" is the beginning of one."""
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    sources = {path: path.read_text("utf-8") for path in (ROOT / "tests").glob("*/test_*.py")}
    tests = {name for source in sources.values() for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    named = re.findall(r"`(test_[a-z0-9_]+)(…?)`", page)
    assert len(named) > 50
    missing = [name for name, cut in named if not any(test.startswith(name) if cut else test == name for test in tests)]
    assert missing == []
    assert [path for path in re.findall(r"`(tests/[\w/.]+)`", page) if not (ROOT / path).exists()] == []


def test_the_node_search_finds_every_node_by_common_terms(pack):
    schemas = [node.define_schema() for node in pack.nodes.NODES]
    aliases = {schema.node_id: getattr(schema, "search_aliases", []) for schema in schemas}
    assert [id for id, words in aliases.items() if "hunyuanvideo" not in words] == []
    for word in ("multi gpu", "parallel", "vae decode"):
        assert sum(word in words for words in aliases.values()) >= 2, word


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_generated_page_keeps_its_prose_and_replaces_title_and_table(language):
    texts = {
        "display_name": "A",
        "inputs": {"b": {"name": "b", "tooltip": "New."}},
        "outputs": {"0": {"name": "C", "tooltip": "Made."}},
    }
    page = make_texts.page_with_table("# Old\n\nProse.\n\n| `b` | Old. |\n", texts, language)
    assert page.startswith("# A\n\nProse.\n\n|") and "| `b` | New. |" in page and "Old" not in page
