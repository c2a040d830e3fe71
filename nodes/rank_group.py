"""Rank Group: starts the processes that the other nodes run on."""

from comfy_api.latest import io

from ..distributed.group import KEEP
from ..distributed.ranks.devices import COLLECTIVES
from ..distributed.vae.job import DTYPES
from . import sockets
from .groups import TIMEOUT_LEAST, TIMEOUT_MOST, GroupDescription, live_group
from .sockets import CATEGORY, advanced, searchable


class RankGroupNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return searchable(
            io.Schema(
                node_id="HV15RankGroup",
                display_name="Rank Group",
                category=CATEGORY,
                description="Starts one process per device in the background and keeps the processes between prompts. "
                "It can be placed anywhere in the graph: processes start and load weights while the sampler runs.",
                inputs=[
                    io.String.Input(
                        "devices",
                        default="auto",
                        tooltip="auto: every local accelerator, or two CPU ranks if there is none. Or a list: "
                        "cuda:0,cuda:1 or npu:0-3 or cpu,cpu.",
                    ),
                    advanced(
                        io.Combo.Input(
                            "backend",
                            options=["auto", *COLLECTIVES.values()],
                            tooltip="Communication backend. auto: NCCL on CUDA, HCCL on Ascend, Gloo on CPU.",
                        )
                    ),
                    io.Combo.Input(
                        "dtype",
                        options=["auto", *sorted(DTYPES)],
                        tooltip="Compute dtype of the ranks. auto: bfloat16 on accelerators (float16 on GPUs "
                        "without bfloat16), float32 on the CPU.",
                    ),
                    io.Combo.Input(
                        "keep_loaded",
                        options=list(KEEP),
                        tooltip="After the work is done: keep the weights on the devices, release them, or stop the "
                        "processes.",
                    ),
                    advanced(
                        io.Int.Input(
                            "start_timeout",
                            default=180,
                            min=TIMEOUT_LEAST,
                            max=TIMEOUT_MOST,
                            tooltip="Time limit in seconds for the processes to start.",
                        )
                    ),
                    advanced(
                        io.Int.Input(
                            "stall_timeout",
                            default=120,
                            min=TIMEOUT_LEAST,
                            max=TIMEOUT_MOST,
                            tooltip="Seconds without progress after which a process is considered hung and replaced.",
                        )
                    ),
                ],
                outputs=[
                    sockets.RankGroup.Output(display_name="rank_group", tooltip="For the nodes that run on ranks.")
                ],
            ),
            "multi gpu",
            "parallel",
            "distributed",
            "devices",
        )

    @classmethod
    def execute(cls, **options: object) -> io.NodeOutput:
        description = GroupDescription(**options)
        live_group(description).start()
        return io.NodeOutput(description)
