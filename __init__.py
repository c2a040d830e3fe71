"""HunyuanVideo-1.5 for ComfyUI, with a VAE decode that runs on a group of ranks. ComfyUI's door to the pack."""

from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./web"


class HunyuanVideo15Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .nodes import NODES

        return NODES


async def comfy_entrypoint() -> HunyuanVideo15Extension:
    from server import PromptServer

    from .nodes.routes import add_routes

    add_routes(PromptServer.instance.routes)
    return HunyuanVideo15Extension()
