"""ComfyUI's entry point: HunyuanVideo-1.5 nodes whose VAE decode and denoising run on a group of rank processes."""

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
