"""The transformer of a pipeline on a rank group, for the length of one sampling."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import comfy.model_management
import torch
from torch import Tensor

from ..distributed.denoise.denoiser import Denoiser
from ..distributed.denoise.weights import open_transformer
from .groups import GroupDescription, end_neighbours, group_in_use
from .loading import LoadedPipeline
from .memory import make_room, memory_limit, occupy
from .on_ranks import as_interruption


@contextlib.contextmanager
def transformer_on_ranks(
    loaded: LoadedPipeline,
    guider: object,
    description: GroupDescription,
    steps: int,
    on_block: Callable[[int, int], None],
    notice: Callable[[str], None],
) -> Iterator[torch.nn.Module]:
    """Yield a stand-in for the pipeline's transformer whose forward runs on the ranks.

    guider: this run's own. steps: the number of its steps. on_block is called several times a second with the finished
    part of a step, notice with sentences for the user. If the steps do not run at full speed beside ComfyUI's models,
    these are unloaded from the ranks' devices when the first step begins: until then the pipeline encodes its image.
    Raises ValueError for weights that are not a
    HunyuanVideo-1.5 transformer's, before anything is started.
    """
    from .pipeline_parts import module_on_ranks  # diffusers, which other nodes do without

    checkpoint = open_transformer(loaded.folder)
    with group_in_use(description) as group:
        group.start()
        denoiser = Denoiser(checkpoint, group.run)
        number = 0

        def progress(done: int, total: int) -> None:
            if total:
                on_block(done, total)

        def predict(*step: object, **options: object) -> Tensor:
            nonlocal number
            number += 1
            if number == 1:
                end_neighbours(group)
                occupy(group)
            return denoiser(
                *step,
                **options,
                memory=memory_limit(group, None),
                progress=progress,
                cancelled=comfy.model_management.processing_interrupted,
                notice=notice,
                step=(number, steps),
                make_room=partial(make_room, group) if number == 1 else None,
            )

        try:
            with as_interruption():
                yield module_on_ranks(loaded.pipeline.transformer, guider, predict, denoiser)
        finally:
            group.finish()
