"""Metrics of several processes: no byte is written that the disk has not promised, and a full disk ends nobody."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from shared.metric_files import FIRST_BYTES, ReservedDict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are reserved on Linux")
MANY = {f"key {number}": float(number) for number in range(3000)}


def full(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Let files grow to `room` bytes."""
    reserve = os.posix_fallocate

    def reserve_if_there_is_room(fd: int, offset: int, size: int) -> None:
        if size > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", reserve_if_there_is_room)


def filled(path: Path) -> Any:
    written: Any = ReservedDict(str(path))
    for key, value in MANY.items():
        written.write_value(key, value, 0.0)
    return written


def shown(path: Path) -> dict[str, float]:
    library: Any = MmapedDict
    return {key.rstrip(): value for key, value, *_ in library.read_all_values_from_file(str(path))}


def test_others_read_what_is_written_and_none_of_it_is_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "counter_1.db"
    written = filled(path)
    assert shown(path) == MANY
    assert path.stat().st_blocks * 512 >= written._used > FIRST_BYTES
    written.close()


@pytest.mark.parametrize("room", [0, FIRST_BYTES, 80_000])
def test_a_full_disk_hides_new_values_and_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    full(monkeypatch, room)
    path = tmp_path / "counter_1.db"
    written = filled(path)
    assert {key: written.read_value(key)[0] for key in MANY} == MANY
    assert len(caplog.records) == 1
    if room == 0:
        assert [*tmp_path.iterdir()] == []
    else:
        assert 0 < len(shown(path)) < len(MANY)
        assert shown(path).items() < MANY.items()
    written.close()


def test_a_file_that_is_being_made_fails_nobody_who_reads_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, reads = os.posix_fallocate, list[list[Any]]()
    library: Any = MultiProcessCollector

    def reserve_while_somebody_reads(fd: int, offset: int, size: int) -> None:
        reads.append([*library(None, str(tmp_path)).collect()])
        reserve(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", reserve_while_somebody_reads)
    for name in ("counter_1.db", "counter_1.db", "counter_2.db"):  # the second has the name of one before it
        ReservedDict(str(tmp_path / name)).close()  # type: ignore[no-untyped-call]
    assert reads == [[], [], []]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counter_1.db", "counter_2.db"]


def test_a_file_that_cannot_be_made_ends_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = filled(tmp_path / "none" / "counter_1.db")
    assert len(caplog.records) == 1
    written.close()


@pytest.mark.system
def test_services_have_such_files(tmp_path: Path) -> None:
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    count = "from prometheus_client import Counter; from shared import metrics; Counter('millrace_test', 'One.').inc()"
    subprocess.run([sys.executable, "-c", count], env=environ, check=True)
    [file] = tmp_path.glob("*.db")
    assert file.stat().st_blocks * 512 >= FIRST_BYTES
