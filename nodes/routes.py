"""HTTP API of the rank groups: status, restart and stop.

GET /hv15/groups, POST /hv15/groups/{id}/restart, POST /hv15/groups/{id}/stop

GET includes process ids, so that a rank can be found in `nvidia-smi`. Events that are broadcast to browsers do not.
"""

import asyncio
import ipaddress

from aiohttp import web
from yarl import URL

from .groups import all_groups, find_group, public_status


def add_routes(routes: web.RouteTableDef) -> None:
    """Add the pack's routes to the server, unless it has them already."""
    if any(getattr(route, "path", None) == "/hv15/groups" for route in routes):
        return

    @routes.get("/hv15/groups")
    async def groups(request: web.Request) -> web.Response:
        refuse_strangers(request)
        return web.json_response([public_status(group) for group in all_groups()])

    @routes.post("/hv15/groups/{id}/{action:restart|stop}")
    async def act(request: web.Request) -> web.Response:
        refuse_strangers(request)
        group = find_group(request.match_info["id"])
        if group is None:
            return web.json_response({"error": "No rank group has this id."}, status=404)
        await asyncio.to_thread(group.stop)
        if request.match_info["action"] == "restart":
            await asyncio.to_thread(group.start)
        return web.json_response(public_status(group))


def refuse_strangers(request: web.Request) -> None:
    """Raise HTTPForbidden for two kinds of web pages that pass ComfyUI's own origin check.

    A page without an origin (a sandboxed frame or a file) sends Origin: null. A page whose name resolves to this
    machine's loopback address (DNS rebinding) sends a Host with the server's port and a foreign name. Behind a proxy
    the Host has the proxy's port or none, and is accepted.
    """
    if request.headers.get("Origin") == "null":
        raise web.HTTPForbidden(text="Requests with the origin null are refused.")
    own = request.transport.get_extra_info("sockname") if request.transport else None
    if not own or not _is_address(own[0], loopback=True):
        return
    host = URL(f"http://{request.host}")
    if host.explicit_port == own[1] and host.host != "localhost" and not _is_address(host.host or "", loopback=False):
        raise web.HTTPForbidden(
            text=f"{host.host} is not a name of this machine. Open ComfyUI by its IP address or as localhost."
        )


def _is_address(text: str, *, loopback: bool) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_loopback or not loopback
