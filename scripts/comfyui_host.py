"""A headless ComfyUI with this pack, controlled over HTTP and its websocket, for the demo and the tests."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import numpy as np
from PIL import Image

from set_up import ROOT, comfyui_path

if TYPE_CHECKING:
    import torch

START_SECONDS = 180


@dataclass
class Run:
    """The result of a prompt."""

    outputs: dict = field(default_factory=dict)
    error: dict | None = None
    interrupted: bool = False
    cached: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Run time of each node in seconds, by its id."""
    previews: int = 0
    progress: list[tuple[str, float]] = field(default_factory=list)
    """Reported progress: (node, fraction done)."""
    texts: list[str] = field(default_factory=list)
    """Texts that were shown on nodes."""
    events: list[dict] = field(default_factory=list)
    """The `hv15.group` events."""


def node(kind: str, **inputs: object) -> dict:
    """Return a node of an API prompt."""
    return {"class_type": kind, "inputs": inputs}


class PromptRefused(Exception):
    """The server did not accept the prompt. The argument is the server's response."""


class Host:
    """A ComfyUI server on a free port that writes all of its files into the folder `base`.

    models: a folder of further models. options: further options for ComfyUI's main.py.
    """

    def __init__(self, base: Path, models: Path | None = None, options: Sequence[str] = ()) -> None:
        self.base = base
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (base / name).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / "hunyuanvideo15_distributed"
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "comfyui.log"
        command = [sys.executable, "main.py", "--port", str(self.port), "--base-directory", str(base)]
        command += [
            "--disable-auto-launch",
            "--database-url",
            "sqlite:///:memory:",
            "--preview-method",
            "latent2rgb",
            *options,
        ]
        if models:
            (base / "models.json").write_text(
                json.dumps({"more": {"base_path": str(models), "diffusers": "diffusers"}})
            )
            command += ["--extra-model-paths-config", str(base / "models.json")]  # JSON is valid YAML
        if not _has_accelerator():
            command.append("--cpu")
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(command, cwd=comfyui_path(), stdout=output, stderr=subprocess.STDOUT)

    def wait(self) -> "Host":
        """Wait until the server responds. Raises RuntimeError with its log if it does not."""
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return self
            except aiohttp.ClientError:
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def close(self) -> None:
        """Stop the server."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> object:
        return _answer("GET", self.url + path)

    def post(self, path: str, body: object = None) -> object:
        return _answer("POST", self.url + path, body)

    def rank_pids(self) -> set[int]:
        """Return the process ids of all ranks of all groups."""
        return {rank["pid"] for group in self.get("/hv15/groups") for rank in group["ranks"]}

    def stop_groups(self) -> None:
        """Stop the ranks of all groups. The next prompt starts those that it needs."""
        for group in self.get("/hv15/groups"):
            self.post(f"/hv15/groups/{group['id']}/stop")

    def saved(self, entry: dict) -> Path:
        """Return the path of a file among a run's outputs."""
        return self.base / "output" / entry["subfolder"] / entry["filename"]

    def pictures(self, run: Run, node: str = "save") -> np.ndarray:
        """Return the frames that a node saved, [T, H, W, 3] in 0..255."""
        return np.stack([np.asarray(Image.open(self.saved(entry))) for entry in run.outputs[node]["images"]])

    def save_latent(self, name: str, latent: "torch.Tensor") -> None:
        """Save a latent under a name that LoadLatent lists."""
        import torch
        from safetensors.torch import save_file

        save_file({"latent_tensor": latent, "latent_format_version_0": torch.tensor([])}, self.base / "input" / name)

    def interrupt_at(self, wanted: str, node: str) -> Callable[[str, dict], None]:
        """Return a `follow` for `run` that interrupts once, at the first event of this type from this node."""
        interrupted = threading.Event()

        def follow(type: str, data: dict) -> None:
            if type == wanted and data["node"] == node and not interrupted.is_set():
                interrupted.set()
                threading.Thread(target=self.post, args=("/interrupt",)).start()

        return follow

    def run(self, prompt: dict, follow: Callable[[str, dict], None] = lambda type, data: None, seconds=600) -> Run:
        """Queue an API prompt and wait for its end. `follow` is called with each event of the websocket."""
        return asyncio.run(asyncio.wait_for(self._run(prompt, follow), seconds))

    async def _run(self, prompt: dict, follow: Callable[[str, dict], None]) -> Run:
        client, run = uuid.uuid4().hex, Run()
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as stream:
                body = {"prompt": prompt, "client_id": client}
                async with session.post(f"{self.url}/prompt", json=body) as answer:
                    if answer.status != 200:
                        raise PromptRefused(await answer.json())
                    id = (await answer.json())["prompt_id"]
                await _follow(stream, id, run, follow)
            async with session.get(f"{self.url}/history/{id}") as answer:
                run.outputs = (await answer.json()).get(id, {}).get("outputs", {})
        return run


async def _follow(stream: aiohttp.ClientWebSocketResponse, id: str, run: Run, follow: Callable) -> None:
    node, began = None, time.monotonic()
    async for message in stream:
        if message.type == aiohttp.WSMsgType.BINARY:
            kind = int.from_bytes(message.data[:4], "big")
            run.previews += kind in (1, 4)
            if kind == 3:  # length of the node's id, the id, and the text
                run.texts.append(message.data[8 + int.from_bytes(message.data[4:8], "big") :].decode())
            continue
        if message.type != aiohttp.WSMsgType.TEXT:
            break
        event = json.loads(message.data)
        type, data = event["type"], event["data"]
        if type == "hv15.group":
            run.events.append(data)
        elif data.get("prompt_id") == id:
            if type == "executing":
                now = time.monotonic()
                if node:
                    run.seconds[node] = run.seconds.get(node, 0) + now - began
                node, began = data["node"], now
            elif type == "execution_cached":
                run.cached = data["nodes"]
            elif type == "execution_error":
                run.error = data
            elif type == "execution_interrupted":
                run.interrupted = True
            elif type == "progress":
                run.progress.append((data["node"], data["value"] / max(1, data["max"])))
        follow(type, data)
        if data.get("prompt_id") == id and (
            type in ("execution_error", "execution_interrupted") or (type == "executing" and data["node"] is None)
        ):
            return


def _answer(method: str, url: str, body: object = None) -> object:
    """Send a request and return the response. It runs in a thread, so that a `follow` of `Host.run` can call it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _request(method, url, body)).result()


async def _request(method: str, url: str, body: object = None) -> object:
    async with aiohttp.ClientSession() as session, session.request(method, url, json=body) as answer:
        if answer.content_type == "application/json":
            return await answer.json()
        return await answer.text()


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available() or os.environ.get("ASCEND_HOME_PATH") is not None
