"""The pack in ComfyUI's web UI, in a real headless Chromium that is driven over its DevTools protocol.

Needs a Chromium: on the PATH, or named by CHROMIUM. Without one these tests are skipped.
"""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK = "hunyuanvideo15_distributed"
TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1600,1000",
    "about:blank",
]


class Page:
    """A tab of the browser. `run` evaluates JavaScript, the body of an async function, and returns its result."""

    def __init__(self, debugger: str) -> None:
        self.debugger = debugger
        self.numbers = itertools.count(1)

    def run(self, script: str, seconds: float = 120) -> object:
        return asyncio.run(asyncio.wait_for(self._run(script), seconds))

    async def _run(self, script: str) -> object:
        options = {"expression": f"(async () => {{{script}}})()", "awaitPromise": True, "returnByValue": True}
        answer = await self._call("Runtime.evaluate", options)
        if "exceptionDetails" in answer:
            raise AssertionError(json.dumps(answer["exceptionDetails"]["exception"], indent=1))
        return answer["result"].get("value")

    async def _call(self, method: str, params: dict) -> dict:
        number = next(self.numbers)
        async with aiohttp.ClientSession() as session, session.ws_connect(self.debugger, max_msg_size=0) as socket:
            await socket.send_json({"id": number, "method": method, "params": params})
            async for message in socket:
                answer = json.loads(message.data)
                if answer.get("id") == number:
                    return answer.get("result") or {"exceptionDetails": {"exception": answer["error"]}}
        raise AssertionError("the browser hung up")

    def until(self, condition: str, seconds: float = 60) -> object:
        """Wait until a JavaScript expression is true; return its value."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if value := self.run(f"return ({condition})"):
                return value
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds} s: {condition}")


@pytest.fixture(scope="module")
def page(host, tmp_path_factory):
    """ComfyUI's web UI, loaded."""
    binary = os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)
    if not binary:
        pytest.skip("there is no Chromium: install one, or name it with CHROMIUM")
    folder = tmp_path_factory.mktemp("chromium")
    process = subprocess.Popen(
        [binary, f"--user-data-dir={folder}", *FLAGS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield asyncio.run(open_page(folder, host.url))
    finally:
        process.terminate()
        process.wait(20)


async def open_page(folder: Path, url: str) -> Page:
    limit = time.monotonic() + 60
    while not (port_file := folder / "DevToolsActivePort").exists() or not port_file.read_text():
        assert time.monotonic() < limit, "Chromium did not start"
        await asyncio.sleep(0.1)
    port = port_file.read_text().split()[0]
    async with (
        aiohttp.ClientSession() as session,
        session.put(f"http://127.0.0.1:{port}/json/new?{url}") as answer,
    ):
        page = Page((await answer.json(content_type=None))["webSocketDebuggerUrl"])
    ready = "return !!(window.app?.graph && window.LiteGraph?.registered_node_types?.HV15Sampler)"
    while True:
        assert time.monotonic() < limit + 60, "ComfyUI's web UI did not load"
        if await page._run(ready):
            return page
        await asyncio.sleep(0.3)


def load(page: Page, template: str) -> dict:
    """Open a template as the template browser does; return what is missing and the API prompt it makes."""
    return page.run(
        f"""
        const graph = await (await fetch("/api/workflow_templates/{PACK}/{template}.json")).json();
        await app.loadGraphData(graph);
        const missing = app.graph._nodes.filter((node) => !LiteGraph.registered_node_types[node.type]);
        const {{ output }} = await app.graphToPrompt();
        return {{ missing: missing.map((node) => node.type), count: app.graph._nodes.length, output }};
        """
    )


def test_every_template_is_listed_with_a_picture(page):
    listed = page.run("return await (await fetch('/api/workflow_templates')).json()")
    assert sorted(listed[PACK]) == TEMPLATES
    for name in TEMPLATES:
        assert page.run(f"return (await fetch('/api/workflow_templates/{PACK}/{name}.jpg')).ok")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_opens_with_no_missing_node(page, template):
    loaded = load(page, template)
    assert loaded["missing"] == [] and loaded["count"] > 0
    alerts = page.run("return [...document.querySelectorAll('.p-toast-message')].map((toast) => toast.textContent)")
    assert [text for text in alerts if "workflow" in text] == []


@pytest.mark.parametrize("name", ["text_to_video", "image_to_video", "decode_saved_latent"])
def test_a_template_queues_the_same_job_as_its_api_prompt(page, prompt, name):
    made = load(page, name)["output"]
    expected = prompt(name)
    expected["ranks"]["inputs"]["devices"] = "auto"
    numbers = {key: str(number) for number, key in enumerate(expected, 1)}
    for key, node in expected.items():
        theirs = made[numbers[key]]
        assert theirs["class_type"] == node["class_type"]
        for input, value in node["inputs"].items():
            linked = [numbers[value[0]], value[1]] if isinstance(value, list) else value
            assert theirs["inputs"][input] == linked, f"{key}.{input}"


def test_the_panel_shows_a_group_at_work_and_stops_it(page, host):
    load(page, "text_to_video")
    page.until("document.querySelector('.hv15\\\\.groups-tab-button') !== null")
    page.run("document.querySelector('.hv15\\\\.groups-tab-button').click()")
    page.until("document.querySelector('.hv15-panel') !== null")
    page.run(
        """
        window.seen = new Set();
        const look = () => document.querySelectorAll(".hv15-group").forEach((box) => seen.add(box.dataset.state));
        new MutationObserver(look).observe(document.body, { subtree: true, childList: true });
        const by = (type) => app.graph._nodes.find((node) => node.type === type);
        by("HV15RankGroup").widgets.find((widget) => widget.name === "stall_timeout").value = 99;
        for (const [name, value] of [["width", 96], ["height", 64], ["frames", 5], ["steps", 2]])
          by("HV15Sampler").widgets.find((widget) => widget.name === name).value = value;
        await app.queuePrompt(0);
        """
    )
    page.until("seen.has('starting') && seen.has('busy')", 120)
    page.until("document.querySelector('.hv15-group:last-child')?.dataset.state === 'ready'")
    assert page.run("return document.querySelectorAll('.hv15-group:last-child .hv15-rank').length") == 2
    page.run("document.querySelector('.hv15-group:last-child .hv15-stop').click()")
    page.until("document.querySelector('.hv15-group:last-child').dataset.state === 'stopped'")
    assert host.get("/hv15/groups")[-1]["state"] == "stopped"


def test_each_node_has_a_help_page_in_both_languages(page):
    ids = page.run("return Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith('HV15'))")
    assert len(ids) == 7
    for id in ids:
        assert page.run(f"return (await (await fetch('/extensions/{PACK}/docs/{id}.md')).text()).startsWith('# ')")
        assert page.run(f"return (await (await fetch('/extensions/{PACK}/docs/{id}/zh.md')).text()).startsWith('# ')")
