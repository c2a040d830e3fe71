"""The rules of the layout: which package may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "distributed"


def imports(file: Path) -> Iterator[str]:
    """The modules of `distributed` that a file imports anywhere, by their full names; also under TYPE_CHECKING."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "distributed")
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def breaks(file: Path, *forbidden: str) -> list[str]:
    """The imports of a file that lie in one of these packages."""
    return [name for name in imports(file) for rule in forbidden if name == rule or name.startswith(f"{rule}.")]


RANKS = sorted((PACKAGE / "ranks").glob("*.py"))
JOBS = sorted(PACKAGE.glob("*/job.py"))


@pytest.mark.parametrize("file", RANKS, ids=lambda file: file.stem)
def test_ranks_know_no_kind_of_job_and_no_model(file):
    assert breaks(file, "distributed.vae", "distributed.denoise", "distributed.ops", "distributed.group") == []


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.parent.stem)
def test_a_job_module_imports_no_compute(file):
    """Nor does what it imports, as tests/ranks/test_use_from_python.py shows in a fresh process."""
    assert breaks(file, "distributed.ops", "distributed.vae.engine", "distributed.vae.task") == []
    assert breaks(file, "distributed.denoise.transformer", "distributed.denoise.task") == []


def test_there_are_files_to_look_at_and_a_break_of_a_rule_would_be_noticed():
    assert len(RANKS) > 10 and {PACKAGE / "vae" / "job.py", PACKAGE / "denoise" / "job.py"} <= set(JOBS)
    assert breaks(PACKAGE / "vae" / "task.py", "distributed.ops", "distributed.vae.engine")
    assert breaks(PACKAGE / "worker.py", "distributed.vae")
