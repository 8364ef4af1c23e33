"""CPU threads: affinity, quotas of both cgroup versions as a kernel writes them, and the share of each process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared import cpu_share
from shared.cpu_share import compute_threads, cpu_quota, torch_threads, usable_cores, within_quota

ROOT = Path(__file__).parents[2]


def quota(tmp_path: Path, membership: str, **files: str) -> float | None:
    """Return the quota of a process whose /proc/PID/cgroup is `membership`. Files: by their path below the root."""
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return cpu_quota(tmp_path / "membership", tmp_path / "cgroup")


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 2, 1), (2, 1, 2), (2, 2, 1), (3, 2, 1), (8, 2, 4), (8, 1, 8)]
)
def test_each_process_has_an_even_share_and_at_least_one_thread(cores: int, processes: int, threads: int) -> None:
    assert compute_threads(cores, processes) == threads


@pytest.mark.parametrize(("wanted", "cores", "threads"), [(0, 3, 3), (0, 64, 6), (5, 3, 5), (64, 3, 64)])
def test_torch_computes_on_the_cores_there_are(
    monkeypatch: pytest.MonkeyPatch, wanted: int, cores: int, threads: int
) -> None:
    monkeypatch.setattr(cpu_share, "usable_cores", lambda: cores)
    assert torch_threads(wanted, default=6) == threads


@pytest.mark.parametrize(
    ("cores", "limit", "usable"), [(8, None, 8), (8, 3.9, 3), (8, 0.5, 1), (2, 16.0, 2), (1, None, 1)]
)
def test_a_quota_counts_in_whole_cores(cores: int, limit: float | None, usable: int) -> None:
    assert within_quota(cores, limit) == usable


def test_version_2_of_a_container(tmp_path: Path) -> None:
    """A container with a namespace of its own finds itself at the root."""
    assert quota(tmp_path, "0::/\n", **{"cpu.max": "150000 100000\n"}) == 1.5


def test_version_2_without_a_quota(tmp_path: Path) -> None:
    assert quota(tmp_path, "0::/user.slice\n", **{"user.slice/cpu.max": "max 100000\n"}) is None


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {"pods/cpu.max": "200000 100000\n", "pods/one/cpu.max": "400000 100000\n", "other/cpu.max": "1000 100000\n"}
    assert quota(tmp_path, "0::/pods/one\n", **files) == 2.0


def test_version_1_by_its_cpu_controller(tmp_path: Path) -> None:
    membership = "9:memory:/a\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/\n0::/\n"
    files = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert quota(tmp_path, membership, **files) is None
    # Seen from inside, the host's path does not exist: the mount's root is the container's own cgroup.
    assert quota(tmp_path, membership, **files | {"cpu/cpu.cfs_quota_us": "300000\n"}) == 3.0


def test_no_cgroups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "absent", tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
@pytest.mark.system
def test_a_process_pinned_to_one_core_uses_one() -> None:
    pinned = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
    script = f"{pinned}\nfrom shared.cpu_share import usable_cores\nprint(usable_cores())"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT).split() == ["1"]
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
