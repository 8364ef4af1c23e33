"""The scratch directory of `millrace serve`: gone with it, at the latest when the next one starts."""

import fcntl
import sys
import tempfile
from pathlib import Path

import pytest

from cli.scratch import LOCK, scratch_directory


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_gone_at_the_end(parent: Path) -> None:
    with scratch_directory("millrace-1-") as directory:
        (directory / "redis").mkdir()
        assert [*parent.iterdir()] == [directory]
    assert [*parent.iterdir()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a Redis may still run there")
def test_what_one_that_was_killed_has_left_is_removed_by_the_next(parent: Path) -> None:
    abandoned, others, elsewhere = (parent / name for name in ("millrace-1", "millrace-2", "other"))
    for directory in (abandoned, others, elsewhere):
        (directory / "redis").mkdir(parents=True)
    for directory in (abandoned, elsewhere):
        (directory / LOCK).touch()  # nobody holds it: its process has ended
    (parent / "millrace-link").symlink_to(elsewhere)
    with scratch_directory("millrace-1-") as used, scratch_directory("millrace-1-") as second:
        assert {*parent.iterdir()} == {used, second, others, elsewhere, parent / "millrace-link"}


def test_the_lock_is_held_while_it_is_used(parent: Path) -> None:
    with (
        scratch_directory("millrace-1-") as directory,
        (directory / LOCK).open("r+") as lock,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
