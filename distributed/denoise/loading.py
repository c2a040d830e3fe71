"""From tensors in host memory, of a mapped checkpoint or of a module, to the weights of a transformer on a device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Architecture, architecture_of_config, block_of, modulates
from .merge import Patch, merge
from .placement import Sizes, sizes_of
from .stream import BlockStream
from .transformer import Transformer
from .upload import Transfer, Uploads
from .weights import Stored


class OnHost(nn.Module):
    """A linear layer whose weights stay on the host, and pass through the device when it computes."""

    def __init__(self, weight: Stored, bias: Stored, uploads: Uploads) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias  # no parameters: these are not the device's
        self.uploads = uploads

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.uploads.moved(self.weight), self.uploads.moved(self.bias))


def patch(stored: Stored, patches: Sequence[Patch], merge_dtype: torch.dtype) -> Stored:
    """Merge patches, in the merge dtype, into a copy of the values of a tensor on the device.

    As in core, the result is rounded to the dtype that the tensor was stored in. Core rounds to 8 bits at random; here
    the result stays in the merge dtype then, which is closer to the exact one.
    """
    merged = merge(stored.to(stored.tensor.device, merge_dtype, copy=True), patches)
    return Stored(merged if stored.in_8_bits else merged.to(stored.tensor.dtype))


def fetch_patched(
    stored: Stored, patches: Sequence[Patch], merge_dtype: torch.dtype, transfer: Transfer
) -> Callable[[], Stored]:
    """Start to copy a tensor and its patches to the device. The result waits for them and returns `patch` of them."""
    fetched = transfer.fetch([stored.tensor, *(tensor for part in patches for tensor in part.tensors.values())])

    def patched() -> Stored:
        whole, *tensors = fetched()
        rest = iter(tensors)
        on_device = [replace(part, tensors={name: next(rest) for name in part.tensors}) for part in patches]
        return patch(stored._replace(tensor=whole), on_device, merge_dtype)

    return patched


def build(architecture: Architecture, weights: Mapping[str, Tensor | Stored], uploads: Uploads) -> Transformer:
    """Return the transformer with these weights, by their names in diffusers' layout. Their values may come later.

    A layer of the modulation whose weights are `Stored` becomes an `OnHost`. A block with other `Stored` weights is
    streamed. Raises torch.OutOfMemoryError.
    """
    # These imports take seconds, which ranks that only decode do not need.
    from diffusers import HunyuanVideo15Transformer3DModel
    from diffusers.models.modeling_utils import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(**architecture.config)
    on_host = {name: part for name, part in weights.items() if isinstance(part, Stored)}
    streamed: dict[int, dict[str, Stored]] = {}
    for name in [name for name in on_host if not modulates(name)]:
        block, within = block_of(name)
        streamed.setdefault(block, {})[within] = on_host.pop(name)
    blocks = BlockStream(model.transformer_blocks, streamed, uploads)
    for layer in {name.rpartition(".")[0] for name in on_host}:
        layer_on_host = OnHost(on_host[f"{layer}.weight"], on_host[f"{layer}.bias"], uploads)
        model.set_submodule(layer, layer_on_host)
    values = {name: part for name, part in weights.items() if isinstance(part, Tensor)}
    of_blocks = {f"transformer_blocks.{i}.{name}" for i, of_block in streamed.items() for name in of_block}
    meta = {name: part for name, part in model.state_dict().items() if name in of_blocks}
    model.load_state_dict(values | meta, assign=True)
    return Transformer(model.eval().requires_grad_(False), blocks)


def streamed(model: nn.Module, device: torch.device) -> Transformer:
    """Return a transformer on a device that streams the blocks of a HunyuanVideo15Transformer3DModel in host memory.

    The modulation's weights stay in host memory, too. The model is not changed. Raises CheckpointError for sizes
    that are not those of a HunyuanVideo-1.5, torch.OutOfMemoryError.
    """
    architecture, sizes = _sizes(model)
    uploads = Uploads(device, model.dtype)
    weights: dict[str, Tensor | Stored] = {}
    with uploads.transfer() as transfer:
        for name, part in model.state_dict().items():
            stored = Stored(part)
            weights[name] = transfer.add(stored) if sizes.smallest.keeps(name) else stored
        return build(architecture, weights, uploads)


def streamed_bytes(model: nn.Module) -> int:
    """Return the size in bytes of the weights that `streamed` puts on the device."""
    _, sizes = _sizes(model)
    return sizes.weights(sizes.smallest)


def _sizes(model: nn.Module) -> tuple[Architecture, Sizes]:
    architecture = architecture_of_config(model.config, "The transformer")
    return architecture, sizes_of(architecture, model.dtype, None)


def put(transformer: Transformer, name: str, part: Tensor | Stored) -> None:
    """Replace one weight of a transformer from `build`."""
    block, within = block_of(name)
    if isinstance(part, Stored) and not modulates(name):
        transformer.blocks.put(block, within, part)
        return
    layer, _, kind = name.rpartition(".")
    value = part if isinstance(part, Stored) else nn.Parameter(part, requires_grad=False)
    setattr(transformer.model.get_submodule(layer), kind, value)
