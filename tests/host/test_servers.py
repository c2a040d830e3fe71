"""Whole servers: side by side, killed, interrupted at any moment, and with invalid workflow values."""

import copy
import random
import signal
import threading
import time

import aiohttp
import psutil
import pytest
import torch

from comfyui_host import Host, PromptRefused


def job(host: Host, prompt, shape=(1, 32, 2, 4, 6), seed: int = 0, **decode) -> dict:
    """Return a prompt that decodes a saved latent of this shape."""
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    name = f"{'x'.join(map(str, shape))}-{seed}.latent"
    host.save_latent(name, latent)
    graph = copy.deepcopy(prompt("decode_saved_latent"))
    graph["latent"]["inputs"]["latent"] = name
    graph["decode"]["inputs"] |= decode
    return graph


@pytest.fixture
def second(tmp_path, monkeypatch):
    """A second server with a temporary folder of its own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    host = Host(tmp_path / "comfyui", tmp_path / "models").wait()
    yield host
    host.process.kill()
    host.process.wait()


def nothing_is_left(second: Host, processes: list[psutil.Process]) -> None:
    """Assert that within ten seconds after a server ended its processes and files are gone."""

    def left() -> list:
        temporary = second.base.parent / "temporary"
        return [process for process in processes if process.is_running()] + list(temporary.glob("hv15-*"))

    limit = time.monotonic() + 10
    while left():
        assert time.monotonic() < limit, left()
        time.sleep(0.1)


def test_two_servers_on_one_machine_never_meet(host, second, prompt):
    runs = {}
    threads = [
        threading.Thread(target=lambda server=server: runs.update({server.port: server.run(job(server, prompt))}))
        for server in (host, second)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.error for run in runs.values()] == [None, None]
    ours, theirs = host.rank_pids(), second.rank_pids()
    assert theirs and ours.isdisjoint(theirs)
    processes = [psutil.Process(pid) for pid in theirs]
    processes += [process.parent() for process in processes]
    second.process.send_signal(signal.SIGTERM)
    second.process.wait(20)
    nothing_is_left(second, processes)
    assert host.rank_pids() == ours
    assert host.run(job(host, prompt, seed=1)).error is None


def test_models_in_extra_model_paths_are_listed(second):
    folder = second.base.parent / "models" / "diffusers" / "real one"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    names = second.get("/object_info/HV15LoadPipeline")["HV15LoadPipeline"]["input"]["required"]["model"]
    assert "real one" in str(names)


def test_a_server_that_is_killed_in_a_decode_leaves_nothing(second, prompt):
    processes: list[psutil.Process] = []
    commands: list[str] = []

    def follow(type: str, data: dict) -> None:
        if type == "progress" and data["node"] == "decode" and not processes:
            processes.extend(psutil.Process(second.process.pid).children(recursive=True))
            commands.extend(" ".join(process.cmdline()) for process in processes)
            second.process.kill()

    with pytest.raises(aiohttp.ClientError):
        second.run(job(second, prompt, (1, 32, 30, 8, 12)), follow)
    second.process.wait(10)
    assert sum("distributed.worker" in command for command in commands) == 3, "the launcher and two ranks"
    nothing_is_left(second, processes)


def test_a_rank_that_dies_twice_ends_the_prompt_with_an_error_and_the_next_prompt_works(host, prompt):
    graph = job(host, prompt, (1, 32, 20, 8, 12))
    killed: list[int] = []

    def follow(type: str, data: dict) -> None:
        if type != "hv15.group" or data["state"] != "busy":
            return
        (group,) = [group for group in host.get("/hv15/groups") if group["id"] == data["id"]]
        rank = group["ranks"][1]  # "loading" if it loads weights ahead of the decode
        if group["state"] == rank["state"] == "busy" and rank["pid"] not in killed:
            killed.append(rank["pid"])
            psutil.Process(killed[-1]).kill()

    run = host.run(graph, follow)
    message = run.error["exception_message"]
    assert len(killed) == 2 and "rank 1 (cpu)" in message and "killed by signal 9" in message and "Its log, " in message
    states = [event["state"] for event in run.events]
    assert "recovering" in states and states[-1] == "failed"
    assert any("retrying the decode" in text for text in run.texts), "the user was not notified"
    (group,) = [group for group in host.get("/hv15/groups") if group["state"] == "failed"]
    assert "killed by signal 9" in group["error"] and "/" not in group["error"]
    assert host.run(job(host, prompt, seed=6)).error is None


def test_an_interrupt_while_the_group_starts_ends_the_prompt_and_the_next_one_works(host, prompt):
    graph = job(host, prompt, seed=2)
    host.stop_groups()
    run = host.run(graph, host.interrupt_at("executing", "decode"))
    assert run.interrupted
    assert "ready" not in {event["state"] for event in run.events}, "the group had started before the interrupt"
    assert host.run(graph).error is None


def test_an_interrupt_while_sampling_ends_the_prompt_and_the_next_one_works(host, prompt):
    graph = copy.deepcopy(prompt("text_to_video"))
    graph["sampler"]["inputs"] |= {"width": 96, "height": 64, "frames": 5, "steps": 40}
    run = host.run(graph, host.interrupt_at("progress", "sampler"))
    assert run.interrupted and max(part for node, part in run.progress if node == "sampler") < 1
    graph["sampler"]["inputs"]["steps"] = 2
    assert host.run(graph).error is None


HOSTILE = {
    "devices": [
        "",
        ",",
        "cuda:999",
        "cpu,cuda:0",
        "npu:0-99999",
        "cpu" + ",cpu" * 5000,
        "../../etc",
        "\x00",
        "cpu;ls",
        "🎞",
    ],
    "backend": ["", "nccl", "mpi", 3, None],
    "dtype": ["int8", "float64", [], True],
    "keep_loaded": ["forever", -1],
    "start_timeout": [0, -1, 1e99, "soon"],
    "stall_timeout": [0, None, "never"],
    "mode": ["seamles", "", 7],
    "tile_size": [0, -256, 100, 33, 2**40, "big"],
    "overlap": [-1, 2**31, 999999],
    "samples": [["latent", 5], "latent", 3],
    "vae": [["latent", 0], "tiny", None],
    "rank_group": [["vae", 0], "cpu,cpu", {}],
}


def test_hostile_workflow_values_are_refused_and_the_ranks_keep_running(host, prompt):
    assert host.run(job(host, prompt)).error is None
    before = host.rank_pids()
    cases = [(name, value) for name, values in HOSTILE.items() for value in values]
    for name, value in cases:
        graph = job(host, prompt, seed=3, mode="tiled")
        node = "ranks" if name in graph["ranks"]["inputs"] else "decode"
        graph[node]["inputs"][name] = value
        try:
            run = host.run(graph)
        except PromptRefused:
            continue
        assert run.error, f"{name} = {value!r} was accepted"
        message = run.error["exception_message"]
        assert len(message) > 20 and "Traceback" not in message, f"{name} = {value!r}: {message}"
    assert host.rank_pids() == before
    assert host.run(job(host, prompt, seed=4)).error is None


def test_random_latents_are_decoded_or_refused_with_a_message(host, prompt):
    chance = random.Random(5)
    before = host.rank_pids()
    for seed in range(12):
        shape = [chance.choice([0, 1, 1, 2, 3]) for _ in range(chance.choice([3, 4, 5, 5, 5, 6]))]
        if len(shape) > 1:
            shape[1] = chance.choice([32, 32, 16, 4])
        run = host.run(job(host, prompt, tuple(shape), seed))
        if run.error:
            assert "latent" in run.error["exception_message"].lower(), (shape, run.error["exception_message"])
        else:
            assert len(shape) == 5 and shape[1] == 32 and 0 not in shape, shape
    assert host.rank_pids() == before
