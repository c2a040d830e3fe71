"""The files of the pack other than code: requirements and templates."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_requirements_equal_those_of_the_project_and_exclude_torch():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if not line.startswith("#")]
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^dependencies = (\[.*\])$", project, re.MULTILINE)[1] == json.dumps(required)
    assert not any(re.match(r"torch\b", line) for line in required)


def test_every_template_has_a_thumbnail():
    graphs = list((ROOT / "example_workflows").glob("*.json"))
    assert graphs
    for graph in graphs:
        assert graph.with_suffix(".jpg").stat().st_size > 1000
