"""Memory limits of control groups, from files in the kernel's format. `tests/ranks/test_limits.py` uses real groups."""

from types import SimpleNamespace

import pytest

from distributed.ranks import memory

GIB = 2**30


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Return a function that makes this process a member of control groups described by files."""
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "MOUNTS", tmp_path / "mounts")
    host = SimpleNamespace(total=64 * GIB, available=32 * GIB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: host)

    def make(membership: str, mounts: list[str], files: dict[str, str]) -> None:
        (tmp_path / "membership").write_text(membership)
        (tmp_path / "mounts").write_text("\n".join(mounts).replace("TOP", str(tmp_path / "top")))
        for name, text in files.items():
            path = tmp_path / "top" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


V2 = "30 23 0:26 {root} TOP rw,nosuid shared:9 - cgroup2 cgroup2 rw"
V1 = "35 31 0:31 {root} TOP rw,nosuid - cgroup cgroup rw,memory"
V1_OTHER = "34 31 0:30 / TOP/other rw,nosuid - cgroup cgroup rw,cpu"


def v2(limit: str, used: int, cache: int = 0) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {cache}\nactive_file 7\n",
    }


def inside(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_without_a_limit_the_machines_memory_is_used(group):
    group("0::/user\n", [V2.format(root="/")], inside("user", v2("max", GIB)))
    assert memory.available_memory() == 32 * GIB
    assert memory.describe_memory() == "32.00 GiB is available (the machine has 64.00 GiB)"


def test_a_version_2_limit_excludes_the_page_cache(group):
    group("0::/job\n", [V2.format(root="/")], inside("job", v2(str(8 * GIB), 5 * GIB, 2 * GIB)))
    assert memory.available_memory() == 5 * GIB
    assert memory.describe_memory() == "5.00 GiB is available (the container's limit is 8.00 GiB)"


def test_the_tightest_limit_of_nested_groups_applies(group):
    files = inside("slice/job/step", v2("max", GIB)) | inside("slice/job", v2(str(20 * GIB), GIB))
    group("0::/slice/job/step\n", [V2.format(root="/")], files | inside("slice", v2(str(10 * GIB), 7 * GIB)))
    assert memory.available_memory() == 3 * GIB


@pytest.mark.parametrize("root", ["/docker/abc", "/"])
def test_a_container_that_sees_only_its_own_group_reads_it_at_the_mount_root(group, root):
    group("0::/docker/abc\n", [V2.format(root=root)], v2(str(6 * GIB), GIB))
    assert memory.available_memory() == 5 * GIB


def test_a_version_1_limit_applies(group):
    files = {"memory.limit_in_bytes": str(4 * GIB), "memory.usage_in_bytes": str(3 * GIB)}
    files |= {"memory.stat": f"cache 1\ninactive_file 1\ntotal_inactive_file {GIB // 2}\n"}
    no_limit = {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "1", "memory.stat": ""}
    group("7:cpu:/job\n5:memory:/job\n0::/\n", [V1_OTHER, V1.format(root="/")], inside("job", files) | no_limit)
    assert memory.available_memory() == 3 * GIB // 2


def test_a_group_over_its_limit_has_no_memory_available(group):
    group("0::/job\n", [V2.format(root="/")], inside("job", v2(str(GIB), 2 * GIB)))
    assert memory.available_memory() == 0


def test_without_control_groups_the_machines_memory_is_used(group):
    assert memory.available_memory() == 32 * GIB
