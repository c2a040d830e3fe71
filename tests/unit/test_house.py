"""Rules for the source code: which package may import which, and where device types are compared."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "distributed"


def imports(file: Path) -> Iterator[str]:
    """Yield the full names of the modules of `distributed` that a file imports anywhere, also under TYPE_CHECKING."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "distributed")
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def forbidden_imports(file: Path, *forbidden: str) -> list[str]:
    """Return the imports of a file that are in one of the forbidden packages."""
    return [name for name in imports(file) for rule in forbidden if name == rule or name.startswith(f"{rule}.")]


def device_comparisons(source: str) -> list[int]:
    """Return the lines of a source text that compare something with a device type, or query a tensor's device type."""

    def is_kind(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and node.value in KINDS

    def compares(node: ast.AST) -> bool:
        match node:
            case ast.Compare():
                return any(map(is_kind, ast.walk(node)))
            case ast.match_case():
                return any(map(is_kind, ast.walk(node.pattern)))
            case ast.Call(func=ast.Attribute(attr="startswith" | "endswith")):
                return any(map(is_kind, ast.walk(node)))
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=name), *_]):
                return name in TENSOR_FLAGS
            case ast.Attribute():
                return node.attr in TENSOR_FLAGS
        return False

    nodes = [node for node in ast.walk(ast.parse(source)) if compares(node)]
    return sorted({getattr(node, "lineno", getattr(getattr(node, "pattern", None), "lineno", 0)) for node in nodes})


KINDS = ("cpu", "cuda", "npu")
TENSOR_FLAGS = ("is_cpu", "is_cuda", "is_npu")
DEVICES = PACKAGE / "ranks" / "devices.py"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != DEVICES)
RANKS = sorted((PACKAGE / "ranks").glob("*.py"))
JOBS = sorted(PACKAGE.glob("*/job.py"))


@pytest.mark.parametrize("file", RANKS, ids=lambda file: file.stem)
def test_the_ranks_package_imports_no_kind_of_job_and_no_model(file):
    assert (
        forbidden_imports(file, "distributed.vae", "distributed.denoise", "distributed.ops", "distributed.group") == []
    )


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.parent.stem)
def test_a_job_module_imports_no_compute(file):
    """Its imports do not import it either: tests/ranks/test_use_from_python.py checks this in a new process."""
    assert forbidden_imports(file, "distributed.ops", "distributed.vae.engine", "distributed.vae.task") == []
    assert forbidden_imports(file, "distributed.denoise.transformer", "distributed.denoise.task") == []


def test_a_forbidden_import_would_be_found():
    assert len(RANKS) > 10 and {PACKAGE / "vae" / "job.py", PACKAGE / "denoise" / "job.py"} <= set(JOBS)
    assert forbidden_imports(PACKAGE / "vae" / "task.py", "distributed.ops", "distributed.vae.engine")
    assert forbidden_imports(PACKAGE / "worker.py", "distributed.vae")


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_device_types_are_compared_only_in_devices(file):
    assert device_comparisons(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "x.device.type == 'cuda'",
        "'cpu' != kind_of(name)",
        "device in ('cuda', 'npu')",
        "device.startswith('cuda')",
        "x.is_cuda",
        "getattr(x, 'is_npu', False)",
        "match kind:\n    case 'cpu' | 'npu': pass",
    ],
)
def test_a_comparison_of_a_device_type_would_be_found(source):
    assert device_comparisons(source)
    assert device_comparisons(DEVICES.read_text()) and len(SOURCES) > 40
    assert not device_comparisons("Device(x.device).is_host; torch.device('cpu'); key == 'cpus'")
