"""Distribute Model: takes a core MODEL and returns one whose forward runs on a rank group.

The MODEL keeps everything else: samplers, guiders, previews and other nodes' wrappers work on it as before. During a
sampling, the forward of the network is replaced on the network itself, below all wrappers, and its weights are not
loaded onto ComfyUI's device.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..distributed.denoise.denoiser import Denoiser
from ..distributed.denoise.job import Conditions
from .core_limits import reason_to_stay
from .core_sampling import Forward
from .core_weights import check_model, checkpoint_of, file_of, network_of, patches_of
from .groups import GroupDescription, end_neighbours, group_in_use
from .libraries import check_transformer
from .memory import limit_in_bytes, make_room, memory_limit, occupy
from .on_ranks import as_interruption
from .progress import Progress
from .sockets import CATEGORY, memory_input, rank_group_input, searchable

KEY = "hv15_distribute_model"
"""Key of the wrappers. A MODEL has one of each: another Distribute Model node replaces them."""


@dataclass(frozen=True, eq=False)
class _Run:
    """One sampling: the MODEL, and what is undone at the end."""

    patcher: comfy.model_patcher.ModelPatcher
    stack: contextlib.ExitStack


class ModelOnRanks:
    """The wrappers of one Distribute Model node. memory: limit per rank in bytes, or None."""

    def __init__(self, description: GroupDescription | None, memory: int | None) -> None:
        self.description, self.memory = description, memory
        self.run: _Run | None = None

    def attach(self, patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """Return a clone of a MODEL that samples on the ranks."""
        clone = patcher.clone()
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self.sample), (WrappersMP.PREPARE_SAMPLING, self.prepare)):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        return clone

    def sample(self, executor: WrapperExecutor, *args: object, **options: object) -> Tensor:
        """Wrap a sampling. However it ends, the network and the MODEL are as they were before."""
        outer = self.run
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "run", outer)
            self.run = _Run(executor.class_obj.model_patcher, stack)
            return executor(*args, **options)

    def prepare(self, executor: WrapperExecutor, *args: object, **options: object) -> tuple:
        """Wrap core's `prepare_sampling`: replace its innermost function, so that other wrappers still run."""
        inner = executor.original

        def prepare(patcher: object, noise_shape: object, conds: dict, **rest: object) -> tuple:
            run = self.run
            if run is None or run.patcher is not patcher:  # a second model of the guider, or training
                return inner(patcher, noise_shape, conds, **rest)
            loading = {name: value for name, value in rest.items() if name != "model_options"}
            model_options = rest.get("model_options") or {}
            if reason := reason_to_stay(patcher, conds, model_options, loading):
                Progress().tell(f"This sampling runs in ComfyUI's process: ranks cannot compute {reason}.")
                return inner(patcher, noise_shape, conds, **rest)
            return self._on_ranks(run, conds, model_options)

        return WrapperExecutor(prepare, executor.class_obj, executor.wrappers, executor.idx)(*args, **options)

    def _on_ranks(self, run: _Run, conds: dict, model_options: dict) -> tuple:
        """Do what `prepare_sampling` does, except for loading the MODEL. Its forward runs on the ranks from here on."""
        patcher = run.patcher
        helpers = comfy.sampler_helpers
        further = helpers.get_additional_models(conds, patcher.model_dtype())[0]
        further += helpers.get_additional_models_from_model_options(model_options)
        further += patcher.get_nested_additional_models()
        predict = run.stack.enter_context(_ranks(patcher, self.description, self.memory, further))
        compiled = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
        compiled.pop("torch.compile", None)  # of this run only: nothing is left to compile
        patcher.unpatch_model(unpatch_weights=False)  # a loaded clone's object patches may be in force
        run.stack.callback(patcher.unpatch_model, unpatch_weights=False)
        patcher.patch_model(load_weights=False)
        network = vars(network_of(patcher))
        # An instance attribute: core's `forward` looks it up below all wrappers. An object patch would be taken away by
        # an unload during the run, and would leave a reference cycle around the weights.
        network["_forward"] = torch.compiler.disable(predict)
        run.stack.callback(network.pop, "_forward", None)
        return patcher.model, conds, further


@contextlib.contextmanager
def _ranks(
    patcher: comfy.model_patcher.ModelPatcher,
    description: GroupDescription | None,
    memory: int | None,
    further: Sequence[comfy.model_patcher.ModelPatcher],
) -> Iterator[Forward]:
    """Yield the forward of a MODEL on the ranks of a group, for one sampling. further: models that it uses, too."""
    checkpoint = checkpoint_of(patcher)
    patches = patches_of(patcher, checkpoint)
    params = network_of(patcher).params
    progress = Progress()
    with group_in_use(description) as group:
        group.start()
        end_neighbours(group)
        occupy(group)
        room = iter([partial(make_room, group)])  # for the first step: the others need the same
        if further:
            next(room)()
            comfy.model_management.load_models_gpu(further)
        denoiser = Denoiser(checkpoint, group.run)

        def predict(*step: object, **options: object) -> Tensor:
            with as_interruption():
                return denoiser(
                    *step,
                    **options,
                    patches=patches,
                    averaged_times=not getattr(params, "meanflow_sum", False),
                    memory=memory_limit(group, memory),
                    cancelled=comfy.model_management.processing_interrupted,
                    notice=progress.tell,
                    make_room=next(room, None),
                )

        sizes = checkpoint.architecture
        try:
            yield Forward(predict, partial(Conditions.of_core, checkpoint), sizes.out_channels, sizes.meanflow)
        finally:
            group.finish()


class DistributeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return searchable(
            io.Schema(
                node_id="HV15DistributeModel",
                display_name="Distribute Model",
                category=CATEGORY,
                description="Makes every sampler that uses this model compute on a group of ranks. Connect it "
                "anywhere between the model loader and the sampler. Samplers, guiders, previews and other model nodes "
                "work as before.",
                inputs=[
                    io.Model.Input("model", tooltip="HunyuanVideo-1.5 transformer, from any of ComfyUI's loaders."),
                    rank_group_input(),
                    memory_input(),
                ],
                outputs=[io.Model.Output(tooltip="The same model, computing on ranks.")],
            ),
            "sampler",
            "multi gpu",
            "parallel",
        )

    @classmethod
    def execute(cls, model: object, rank_group: GroupDescription | None = None, memory: float = 0.0) -> io.NodeOutput:
        limit = limit_in_bytes(memory)
        check_model(model)
        file_of(model)  # remembers which file this is, so that a replacement is noticed
        check_transformer()
        with group_in_use(rank_group) as group:
            group.start()
        return io.NodeOutput(ModelOnRanks(rank_group, limit).attach(model))
