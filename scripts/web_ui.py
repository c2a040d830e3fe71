"""ComfyUI's web UI in a headless Chromium, controlled over the DevTools protocol, for the tests and the pictures."""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp

from set_up import CHROMIUM

PACK = "hunyuanvideo15_distributed"
"""Name of the pack's folder in custom_nodes, which is its name in the web UI."""
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--no-zygote",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--window-size=1600,1000",
    "about:blank",
]


class Page:
    """A browser tab."""

    def __init__(self, debugger: str) -> None:
        self.debugger = debugger
        self.numbers = itertools.count(1)

    def run(self, script: str, seconds: float = 120) -> object:
        """Evaluate the body of an async JavaScript function and return its result. Raises AssertionError on errors."""
        options = {"expression": f"(async () => {{{script}}})()", "awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", options, seconds)
        if "exceptionDetails" in answer:
            raise AssertionError(json.dumps(answer["exceptionDetails"]["exception"], indent=1))
        return answer["result"].get("value")

    def open_template(self, name: str) -> None:
        """Open one of this pack's templates, as the template browser does."""
        self.run(
            f"""
            const graph = await (await fetch("/api/workflow_templates/{PACK}/{name}.json")).json();
            await app.loadGraphData(graph);
            """
        )

    def until(self, condition: str, seconds: float = 60) -> object:
        """Wait until a JavaScript expression is true and return its value. Raises AssertionError after `seconds`."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if value := self.run(f"return ({condition})"):
                return value
            time.sleep(0.2)
        raise AssertionError(f"still false after {seconds} s: {condition}")

    def picture(self, target: Path) -> None:
        """Write a screenshot of the tab as PNG."""
        target.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", {}, 60)["data"]))

    def call(self, method: str, params: dict, seconds: float) -> dict:
        """Call a method of the DevTools protocol and return its result."""
        return asyncio.run(asyncio.wait_for(self._call(method, params), seconds))

    async def _call(self, method: str, params: dict) -> dict:
        number = next(self.numbers)
        async with aiohttp.ClientSession() as session, session.ws_connect(self.debugger, max_msg_size=0) as socket:
            await socket.send_json({"id": number, "method": method, "params": params})
            async for message in socket:
                answer = json.loads(message.data)
                if answer.get("id") == number:
                    if "error" in answer:
                        return {"exceptionDetails": {"exception": answer["error"]}}
                    return answer["result"]  # empty for some methods
        raise AssertionError("the browser closed the connection")


@contextlib.contextmanager
def open_page(chromium: str, url: str) -> Iterator[Page]:
    """Yield a tab with ComfyUI's web UI at `url`, loaded with this pack's nodes."""
    with tempfile.TemporaryDirectory(prefix="hv15-chromium-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [chromium, f"--user-data-dir={folder}", *FLAGS],
            env=environment(chromium, Path(folder)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            page = Page(asyncio.run(_debugger(Path(folder) / "DevToolsActivePort", url)))
            page.until("window.app?.graph && window.LiteGraph?.registered_node_types?.HV15Sampler && true", 120)
            yield page
        finally:
            process.terminate()
            process.wait(20)


def environment(chromium: str, folder: Path) -> dict[str, str]:
    """Return Chromium's environment. The Chromium of `set_up` brings libraries and fonts, which this refers to."""
    home = Path(chromium).parent
    if home != CHROMIUM:
        return dict(os.environ)
    fonts = folder / "fonts.conf"
    fonts.write_text(
        f'<fontconfig><include ignore_missing="yes">/etc/fonts/fonts.conf</include><dir>{home / "fonts"}</dir>'
        f"<cachedir>{folder}</cachedir></fontconfig>"
    )
    return {**os.environ, "LD_LIBRARY_PATH": str(home / "al2023" / "lib"), "FONTCONFIG_FILE": str(fonts)}


async def _debugger(port_file: Path, url: str) -> str:
    """Open a tab with `url` and return the address of its DevTools websocket."""
    limit = time.monotonic() + 60
    while not port_file.exists() or not port_file.read_text():
        assert time.monotonic() < limit, "Chromium did not start"
        await asyncio.sleep(0.1)
    port = port_file.read_text().split()[0]
    async with (
        aiohttp.ClientSession() as session,
        session.put(f"http://127.0.0.1:{port}/json/new?{url}") as answer,
    ):
        return (await answer.json(content_type=None))["webSocketDebuggerUrl"]
