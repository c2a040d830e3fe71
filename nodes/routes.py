"""HTTP: how the rank groups are, and two things to do with one.

GET /hv15/groups, POST /hv15/groups/{id}/restart, POST /hv15/groups/{id}/stop

GET lists process ids, for those who look for a rank in `nvidia-smi`; what is broadcast to browsers does not.
"""

import asyncio
import ipaddress

from aiohttp import web
from yarl import URL

from .groups import all_groups, find_group, public_status


def add_routes(routes: web.RouteTableDef) -> None:
    """Add the pack's routes to the server's, once."""
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
            return web.json_response({"error": "There is no such rank group."}, status=404)
        await asyncio.to_thread(group.stop)
        if request.match_info["action"] == "restart":
            await asyncio.to_thread(group.start)
        return web.json_response(public_status(group))


def refuse_strangers(request: web.Request) -> None:
    """Raise 403 for two kinds of web pages that ComfyUI's own check of the origin lets through.

    A page without an origin (a sandboxed frame, a file) sends Origin: null. A page whose name was bound anew to this
    machine's loopback address has the server's own port in its Host, but not one of this machine's names. Behind a
    proxy the Host has the proxy's port or none.
    """
    if request.headers.get("Origin") == "null":
        raise web.HTTPForbidden(text="Requests without an origin are refused.")
    own = request.transport.get_extra_info("sockname") if request.transport else None
    if not own or not _is_address(own[0], loopback=True):
        return
    host = URL(f"http://{request.host}")
    if host.explicit_port == own[1] and host.host != "localhost" and not _is_address(host.host or "", loopback=False):
        raise web.HTTPForbidden(text=f"{host.host} is not a name of this machine. Open ComfyUI by its address.")


def _is_address(text: str, *, loopback: bool) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_loopback or not loopback
