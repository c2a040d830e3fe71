"""The pack's nodes in this process, beside a real ComfyUI's modules but without its server."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.random_weights import FULL
from distributed.vae.hunyuanvideo15.layout import Architecture
from distributed.vae.hunyuanvideo15.weights import Weights

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def pack(tmp_path_factory) -> SimpleNamespace:
    """The modules of the pack's `nodes`, by name, loaded the way ComfyUI does it: under a name of its own."""
    from set_up import comfyui_path

    path = str(comfyui_path())
    sys.path.insert(0, path)  # before the pack's own folder, which has a `nodes` too
    try:
        from comfy.cli_args import args

        args.base_directory = str(tmp_path_factory.mktemp("comfyui"))
        args.cpu = not torch.cuda.is_available()
        name = "hv15_pack_under_test"
        spec = importlib.util.spec_from_file_location(
            name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def part(of: str) -> ModuleType:
            return importlib.import_module(f"{name}.nodes.{of}")

        return SimpleNamespace(**{of: part(of) for of in ("tiny", "vae", "model_lists", "loading", "text", "sampling")})
    finally:
        sys.path.remove(path)
        sys.path.append(path)


@pytest.fixture(scope="session")
def tiny_folders(pack) -> dict[str, Path]:
    """The folders of the built-in models, by kind."""
    return {kind: pack.model_lists.tiny_folder(name) for name, kind in pack.tiny.TINY.items()}


@pytest.fixture(scope="session")
def full_size() -> Callable[[], Weights]:
    """Makes the decoder's weights in the real size, with no memory behind them."""

    def make() -> Weights:
        shapes = Architecture(FULL).decoder_shapes()
        tensors = {key.removeprefix("decoder."): torch.empty(shape, device="meta") for key, shape in shapes.items()}
        return Weights(tensors, torch.device("meta"), torch.bfloat16)

    return make
