"""Fixtures with the pack's modules in this process, with a real ComfyUI's modules but without its server."""

import importlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from core_models import core_model, weights_of  # noqa: E402
from tests.leaks import foreign_processes, servers  # noqa: E402


@pytest.fixture(scope="session")
def pack(tmp_path_factory) -> SimpleNamespace:
    """The modules of the pack's `nodes` and some of their members, imported as ComfyUI imports them."""
    from set_up import comfyui_path

    path = str(comfyui_path())
    sys.path.insert(0, path)  # before the pack's own folder, which has a module `nodes` too
    try:
        from comfy.cli_args import args

        args.base_directory = str(tmp_path_factory.mktemp("comfyui"))
        args.cpu = not torch.cuda.is_available()
        spec = importlib.util.spec_from_file_location(
            "hv15_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["hv15_pack"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = ("vae", "loading", "text", "sampling", "sources", "model_lists")
        modules = {name: importlib.import_module(f"hv15_pack.nodes.{name}") for name in names}
    finally:
        sys.path.remove(path)
        sys.path.append(path)
    vae = modules["vae"]
    return SimpleNamespace(
        **modules,
        nodes=sys.modules["hv15_pack.nodes"],
        module=vae,
        load_vae=vae.load_vae,
        LoadVAE=vae.LoadVAE,
        MappedModel=vae.MappedModel,
        rank_source=modules["sources"].rank_source,
    )


@pytest.fixture(scope="session")
def tiny_folders(pack) -> dict[str, Path]:
    """The folders of the built-in models, by kind."""
    return {kind: pack.model_lists.tiny_folder(name) for name, kind in pack.model_lists.TINY.items()}


@pytest.fixture(autouse=True)
def nothing_is_leaked(request) -> Iterator[None]:
    """Fail the test that leaves a ComfyUI server, or a rank process of no registered group, behind.

    Servers of wider fixtures, which exist before the test begins, may keep running. So may registered groups, as they
    do in ComfyUI.
    """
    if "host" in request.fixturenames:
        request.getfixturevalue("host")
    before = servers()
    yield
    groups = sys.modules.get("hv15_pack.nodes.groups")
    limit = time.monotonic() + 10
    while left := [*servers() - before, *foreign_processes(groups.all_groups() if groups else [])]:
        assert time.monotonic() < limit, f"The test leaves behind: {left}"
        time.sleep(0.1)


@pytest.fixture
def core(pack, tmp_path):
    """Core's model, and a file with its weights as core saves them."""
    model = core_model(pack)
    path = tmp_path / "core.safetensors"
    save_file(weights_of(model), path)
    return SimpleNamespace(model=model, path=path)
