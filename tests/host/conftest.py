"""The pack's modules in this process, beside a real ComfyUI's and on the CPU."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from core_models import core_model, weights_of  # noqa: E402


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """The pack's `nodes.vae`, imported as ComfyUI imports it, in this process and on the CPU."""
    from set_up import comfyui_path

    sys.path.append(str(comfyui_path()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = str(tmp_path_factory.mktemp("base"))
    spec = importlib.util.spec_from_file_location(
        "hv15_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["hv15_pack"] = importlib.util.module_from_spec(spec)
    vae, sources = (importlib.import_module(f"hv15_pack.nodes.{name}") for name in ("vae", "sources"))
    return SimpleNamespace(
        load_vae=vae.load_vae,
        LoadVAE=vae.LoadVAE,
        module=vae,
        MappedModel=vae.MappedModel,
        rank_source=sources.rank_source,
    )


@pytest.fixture
def core(pack, tmp_path):
    """Core's model, and a file of it as core saves one."""
    model = core_model(pack)
    path = tmp_path / "core.safetensors"
    save_file(weights_of(model), path)
    return SimpleNamespace(model=model, path=path)
