"""Forwards of two GPUs, through windows and with NCCL: what `test_window_gpu` starts."""

import gc

import torch
import torch.distributed as dist
from diffusers import HunyuanVideo15Transformer3DModel

from benchmarks.denoise import random_weights
from distributed.denoise.conditions import Condition
from distributed.denoise.parallel import plan
from distributed.denoise.share import Share, window_elements
from distributed.denoise.transformer import Transformer
from distributed.denoise.window import Windows

LATENTS = ((9, 30, 53), (1, 5, 7), (31, 30, 53))
"""The second one has an odd number of tokens, so that parts are uneven. The third one needs a larger window."""
TEXTS = (100, 7)


@torch.inference_mode()
def work(rank: int, store: str) -> None:
    """Compare all forwards on this rank. Raises AssertionError."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.FileStore(store, 2), rank=rank, world_size=2, device_id=device
    )
    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(num_layers=4)
    config = model.config
    transformer, windows = Transformer(random_weights(model, device, torch.bfloat16)), Windows(device)
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    timestep = torch.full((1,), 731.0, device=device)
    (modulation,) = transformer.modulation(timestep)
    widths = config.text_embed_dim, config.text_embed_2_dim, config.image_embed_dim
    conditions = [Condition(*(draw(n, width) for n, width in zip((text, 0, 0), widths, strict=True))) for text in TEXTS]
    contexts = [transformer.encode(condition) for condition in conditions]
    for size in LATENTS:
        latent, group = draw(config.in_channels, *size), dist.group.WORLD
        (split,) = plan(2, 1, size[0] * size[1] * size[2], transformer.heads, transformer.head_dim).branches
        elements = max(window_elements(split, context.tokens, transformer.head_dim) for context in contexts)
        window = windows.of_group((0, 1), group, elements, torch.bfloat16)
        assert window is not None and windows.of_group((0, 1), group, elements, torch.bfloat16) is window
        for context in contexts:
            expected = transformer.forward(latent, timestep, context, modulation, Share(split, rank, group))
            assert expected.isfinite().all()
            for _ in range(5):
                window.own.fill_(torch.nan)
                torch.cuda.synchronize()
                dist.barrier()
                share = Share(split, rank, group, window)
                assert torch.equal(transformer.forward(latent, timestep, context, modulation, share), expected)
    held = windows.nbytes
    del window, share
    dist.barrier()
    before, _ = torch.cuda.mem_get_info(device)
    windows.close()
    gc.collect()
    dist.barrier()
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info(device)
    assert after - before >= held
    dist.destroy_process_group()
