"""Number of CPU threads a process should compute with, from the cores it may use.

The threads of one operation meet at its end and spin while they wait for the last of them, so a thread that finds no
free core holds up all others. On two cores that other processes kept busy, the demo engine made 1.9 tokens/s with two
threads and 27 with one. torch's default is a thread for each core of the machine in every process, and it knows no CPU
quota.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")


def compute_threads(cores: int, processes: int) -> int:
    """Return the threads of each of `processes` that share `cores` evenly, at least 1."""
    return max(1, cores // processes)


def torch_threads(setting: int, default: int) -> int:
    """Return the number of threads for torch: `setting`, or if that is 0 one for each usable core.

    Args:
        default: torch's own number, from physical cores or OMP_NUM_THREADS, which only `setting` may exceed.
    """
    return setting or min(default, usable_cores())


def usable_cores() -> int:
    """Return the cores this process may keep busy: its CPU affinity, cut to the CPU quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return within_quota(cores, cpu_quota(Path("/proc/self/cgroup"), CGROUPS))


def within_quota(cores: int, quota: float | None) -> int:
    """Return `cores`, or the whole cores of a smaller quota, at least 1."""
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(membership: Path, root: Path) -> float | None:
    """Return the CPU time a process may use, in cores: the smallest quota of its cgroup and of those above it.

    Args:
        membership: its /proc/PID/cgroup. In a container the paths in it may be the host's: what does not exist below
            `root` sets no quota, and `root` itself is then the container's own cgroup.
        root: where the cgroup filesystems are mounted, of version 1 or 2.

    Returns:
        None without a quota.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = (_quota(directory) for line in lines for directory in _directories(line, root))
    return min((quota for quota in quotas if quota is not None), default=None)


def _directories(line: str, root: Path) -> Iterator[Path]:
    """Yield the directories of one line of /proc/PID/cgroup that may set a CPU quota, up to the mount point."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return
    mount = root / "cpu" if controllers else root
    inside = PurePosixPath(path.lstrip("/"))
    yield from (mount / each for each in (inside, *inside.parents))


def _quota(directory: Path) -> float | None:
    """Return the quota of one cgroup in cores: from cpu.max of version 2, or the two files of version 1."""
    try:
        if (v2 := directory / "cpu.max").exists():
            limit, period = v2.read_text().split()
        else:
            limit, period = ((directory / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return None if limit in ("max", "-1") else int(limit) / int(period)
