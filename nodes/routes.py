"""HTTP: how the rank groups are, and two things to do with one.

GET /hv15/groups, POST /hv15/groups/{id}/restart, POST /hv15/groups/{id}/stop
"""

import asyncio

from aiohttp import web

from .groups import all_groups, find_group, public_status


def add_routes(routes: web.RouteTableDef) -> None:
    """Add the pack's routes to the server's, once."""
    if any(getattr(route, "path", None) == "/hv15/groups" for route in routes):
        return

    @routes.get("/hv15/groups")
    async def groups(_: web.Request) -> web.Response:
        return web.json_response([public_status(group) for group in all_groups()])

    @routes.post("/hv15/groups/{id}/{action:restart|stop}")
    async def act(request: web.Request) -> web.Response:
        group = find_group(request.match_info["id"])
        if group is None:
            return web.json_response({"error": "There is no such rank group."}, status=404)
        await asyncio.to_thread(group.stop)
        if request.match_info["action"] == "restart":
            await asyncio.to_thread(group.start)
        return web.json_response(public_status(group))
