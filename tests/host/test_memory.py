"""Memory that ComfyUI and the ranks share, and the registry of groups, with ComfyUI's model management."""

import importlib
import secrets
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def memory(pack, monkeypatch):
    """The module, without groups from other tests."""
    import comfy.model_management

    memory = importlib.import_module("hv15_pack.nodes.memory")
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(memory, "_patchers", {})
    yield memory
    monkeypatch.undo()
    comfy.model_management.unload_all_models()


class ReleasedGroup:
    """A group that counts how often it is asked to release its memory."""

    def __init__(self, *devices: str, decoded: bool = True) -> None:
        self.id, self.devices, self.decoded, self.released = secrets.token_hex(4), devices, decoded, 0

    def release(self) -> None:
        self.released += 1


def test_free_and_memory_pressure_release_the_ranks(memory):
    import comfy.model_management

    group = ReleasedGroup("cpu", "cpu")
    memory.occupy(group)
    memory.occupy(group)
    assert not group.released
    comfy.model_management.unload_all_models()
    assert group.released == 1
    comfy.model_management.unload_all_models()
    assert group.released == 1
    memory.occupy(group)
    comfy.model_management.free_memory(1e15, comfy.model_management.get_torch_device())
    assert group.released == 2


def test_weights_that_were_loaded_ahead_stay_until_all_models_are_unloaded(memory):
    import comfy.model_management

    group = ReleasedGroup("cpu", decoded=False)
    memory.register(group)
    memory.register(group)
    comfy.model_management.free_memory(1e15, comfy.model_management.get_torch_device())
    assert not group.released
    comfy.model_management.unload_all_models()
    assert group.released == 1


def test_comfyuis_models_are_unloaded_from_the_devices_of_a_group_only(memory, monkeypatch):
    import comfy.model_management

    freed = []
    monkeypatch.setattr(
        comfy.model_management, "free_memory", lambda size, device, keep=(): freed.append(str(device)) or []
    )
    for devices in (["cuda:1"], ["cuda:3", "cuda:1"]):
        memory.make_room(ReleasedGroup(*devices))
    assert freed == ["cuda:1", "cuda:1", "cuda:3"]


@pytest.fixture
def little_memory(monkeypatch):
    """No device has free memory, as ComfyUI measures it."""
    import comfy.model_management

    def free(device=None, torch_free_too=False):
        return (0, 0) if torch_free_too else 0

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", lambda *_: None)


def test_memory_pressure_on_each_device_of_a_group_reaches_its_ranks(memory, little_memory):
    import comfy.model_management

    for device in ("cuda:1", "cuda:2"):
        group = ReleasedGroup("cuda:1", "cuda:2")
        memory.occupy(group)
        comfy.model_management.free_memory(2**30, torch.device("cuda:3"))
        assert not group.released, "the group has no memory on that device"
        comfy.model_management.free_memory(2**30, torch.device(device))
        comfy.model_management.free_memory(2**30, torch.device("cuda:1"))
        comfy.model_management.free_memory(2**30, torch.device("cuda:2"))
        assert group.released == 1


def test_pressure_on_the_main_device_does_not_affect_ranks_on_other_devices(memory, little_memory):
    import comfy.model_management

    group = ReleasedGroup("cuda:1")
    memory.occupy(group)
    comfy.model_management.free_memory(2**30, comfy.model_management.get_torch_device())
    assert not group.released
    comfy.model_management.unload_all_models()
    assert group.released == 1


class Loaded:
    """A model that ComfyUI has loaded on a device, as listed in `current_loaded_models`."""

    def __init__(self, device: str) -> None:
        self.device, self.model = torch.device(device), object()


def test_ranks_do_not_load_ahead_on_a_device_on_which_comfyui_has_a_model(memory, monkeypatch):
    import comfy.model_management

    group = ReleasedGroup("cuda:0", "cuda:1", "cuda:2", decoded=False)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [])
    assert memory.sampling_devices(group) == ["cuda:0"]
    memory.register(group)
    assert memory.sampling_devices(group) == ["cuda:0"], "proxies must not count as models"
    comfy.model_management.current_loaded_models.append(Loaded("cuda:2"))
    assert memory.sampling_devices(group) == ["cuda:0", "cuda:2"]


def test_weights_that_were_loaded_ahead_are_released_when_comfyui_needs_their_memory(
    memory, little_memory, monkeypatch
):
    import comfy.model_management

    group = ReleasedGroup("cuda:0", "cuda:1", decoded=False)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda:0"))
    memory.register(group)
    comfy.model_management.free_memory(2**30, torch.device("cuda:0"))
    assert not group.released, "nothing was loaded ahead on ComfyUI's main device"
    comfy.model_management.free_memory(2**30, torch.device("cuda:1"))
    assert group.released == 1


def test_reserved_memory_is_not_used_by_ranks(memory, monkeypatch):
    import comfy.model_management

    group = ReleasedGroup("cuda:0", "cuda:1")
    sizes = {"cuda:0": 24 * 2**30, "cuda:1": 16 * 2**30}
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: sizes[str(device)])
    assert memory.memory_limit(group, None) is None and memory.memory_limit(group, 5) == 5
    monkeypatch.setattr(memory.args, "reserve_vram", 4.0)
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 4 * 2**30)
    assert memory.memory_limit(group, None) == 12 * 2**30
    assert memory.memory_limit(group, 5) == 5 and memory.memory_limit(group, 2**40) == 12 * 2**30
    assert memory.memory_limit(ReleasedGroup("cpu", "cpu"), None) is None


@pytest.fixture
def groups(pack, memory, little_memory, monkeypatch):
    """The module without groups from other tests, on a machine with sixteen cores and any device."""
    groups = importlib.import_module("hv15_pack.nodes.groups")
    monkeypatch.setattr(groups, "_groups", {})
    monkeypatch.setattr(groups, "check_devices", lambda devices, backend: None)
    monkeypatch.setattr(groups, "cores", lambda: 16)
    monkeypatch.setattr(groups, "RankGroup", GroupWithoutProcesses)
    yield groups
    for group in groups.all_groups():
        group.stop()


class GroupWithoutProcesses(ReleasedGroup):
    """A group without processes that counts how often it is stopped."""

    def __init__(self, devices, **options) -> None:
        super().__init__(*devices)
        self.stopped, self.state, self.options = 0, "ready", options

    def configure(self, **options) -> None:
        self.options |= options

    def status(self) -> dict:
        return {"id": self.id, "state": self.state, "error": None, "ranks": [{"rank": 0, "pid": 4, "device": "cpu"}]}

    def stop(self) -> None:
        self.stopped += 1


def live(groups, devices, **options):
    return groups.live_group(groups.GroupDescription(devices, **options))


def test_there_is_one_group_for_a_set_of_devices(groups):
    group = live(groups, "cuda:0,cuda:1")
    assert live(groups, "cuda:1, cuda:0", stall_timeout=9) is group and group.options["stall_timeout"] == 9
    assert live(groups, "cpu,cpu") is not live(groups, "cpu") and len(groups.all_groups()) == 3


def test_an_idle_group_ends_when_another_needs_its_device(groups):
    first, second = live(groups, "cuda:0"), live(groups, "cuda:1,cuda:2")
    third = live(groups, "cuda:0,cuda:1")
    groups.end_neighbours(live(groups, "cuda:3"))
    assert not first.stopped and not second.stopped
    with groups.group_in_use(groups.GroupDescription("cuda:1,cuda:2")):
        groups.end_neighbours(third)
    assert (first.stopped, second.stopped, second.released) == (1, 0, 1)
    assert set(groups.all_groups()) == {second, third, live(groups, "cuda:3")}


def test_if_there_are_too_many_groups_the_least_recently_used_idle_one_ends(groups):
    created = [live(groups, f"cuda:{index}") for index in range(groups.MOST_GROUPS)]
    live(groups, "cuda:0")
    created[1].state = "busy"
    latest = live(groups, "cuda:7")
    assert [group.stopped for group in created] == [0, 0, 1, 0]
    for group in groups.all_groups():
        group.state = "busy"
    with pytest.raises(ValueError, match="All 4 rank groups are in use"):
        live(groups, "cuda:6")
    assert latest in groups.all_groups()


def test_a_group_that_ended_is_removed_from_comfyuis_loaded_models(groups, memory):
    import comfy.model_management

    group = live(groups, "cuda:0")
    memory.occupy(group)
    groups.end_neighbours(live(groups, "cuda:0,cuda:1"))
    assert group.stopped and not [e for e in comfy.model_management.current_loaded_models if e.model.group is group]


def test_there_are_no_more_cpu_ranks_than_cores_or_memory_allow(groups, monkeypatch):
    live(groups, ",".join(["cpu"] * 16))
    with pytest.raises(ValueError, match="17 CPU ranks; this machine has 16 cores"):
        live(groups, ",".join(["cpu"] * 17))
    monkeypatch.setattr(groups.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    with pytest.raises(ValueError, match="free memory for 2 ranks"):
        live(groups, "cpu,cpu,cpu")
    live(groups, "cpu,cpu")


def test_auto_means_the_cpu_if_comfyui_was_started_with_cpu(groups, monkeypatch):
    import comfy.model_management as management

    monkeypatch.setattr(groups, "parse_devices", lambda devices: (devices,))
    monkeypatch.setattr(management, "cpu_state", management.CPUState.CPU)
    assert groups._devices(" Auto ") == ("cpu,cpu",) and groups._devices("cuda:1") == ("cuda:1",)
    monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
    assert groups._devices("auto") == ("auto",)


@pytest.mark.parametrize("name", ["start_timeout", "stall_timeout"])
@pytest.mark.parametrize("value", [-5, 0, 4.9, 3601, float("nan"), float("inf"), "120", None, True])
def test_invalid_timeouts_are_refused_before_a_group_is_created(groups, name, value):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be a number of seconds from 5 to 3600"):
        groups.GroupDescription(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("memory", value) for value in (float("nan"), -1.0, "8", 1e9, True)],
        *[("tile_size", 256.0), ("tile_size", None), ("overlap", "64"), ("overlap", True)],
    ],
)
def test_invalid_memory_limits_and_tile_sizes_are_refused_before_anything_is_unloaded(pack, name, value):
    on_ranks = importlib.import_module("hv15_pack.nodes.on_ranks")
    options = {"group": None, "mode": "seamless", "tile_size": 256, "overlap": 64} | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be"):
        on_ranks.DecodeOptions(**options)


def test_process_ids_are_not_broadcast(groups, monkeypatch):
    sent = []
    server = SimpleNamespace(send_sync=lambda event, data: sent.append((event, data)))
    monkeypatch.setattr(groups, "running_server", lambda: server)
    groups.announce(GroupWithoutProcesses(["cpu"]))
    ((event, status),) = sent
    assert event == "hv15.group" and status["ranks"] == [{"rank": 0, "device": "cpu"}]


def test_a_group_takes_new_options_without_being_replaced(pack, monkeypatch):
    groups = importlib.import_module("hv15_pack.nodes.groups")
    monkeypatch.setattr(groups, "_groups", {})
    group = groups.live_group(groups.GroupDescription(devices="cpu,cpu"))
    changed = groups.GroupDescription(devices="CPU, cpu", dtype="float16", keep_loaded="stop", stall_timeout=7)
    assert groups.live_group(changed) is group and groups.all_groups() == [group]
    assert (group.dtype, group.keep_loaded, group.stall_timeout) == ("float16", "stop", 7)
    assert groups.live_group(groups.GroupDescription(devices="cpu")) is not group
    with pytest.raises(ValueError, match="backend is 'nccl'"):
        groups.live_group(groups.GroupDescription(devices="cpu,cpu", backend="nccl"))
