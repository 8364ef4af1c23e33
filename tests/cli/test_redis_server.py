"""The embedded Redis dies and comes back, with its data or without."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.redis_server import RedisServer
from cli.scratch import scratch_directory
from shared.errors import ConfigError


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="millrace-") as name:
        yield Path(name)


def test_a_directory_that_cannot_be_used_is_named(directory: Path) -> None:
    (directory / "file").touch()
    server = RedisServer(directory / "file", unix_socket=directory / "s")
    with pytest.raises(ConfigError, match=r"data cannot be used: .*/file"):
        server.start()


def test_kept_data_are_this_users_alone(directory: Path) -> None:
    kept = directory / "kept"
    with RedisServer(kept, unix_socket=directory / "s", persistence=True) as server:
        assert server.command("SET a 1") == b"+OK\r\n"
        files = [path for path in kept.rglob("*") if path.is_file() and path.stat().st_size]
        assert files
        assert kept.stat().st_mode & 0o777 == 0o700
        assert not any(path.stat().st_mode & 0o077 for path in files)


def test_kept_data_have_one_server_at_a_time(directory: Path) -> None:
    with RedisServer(directory, persistence=True) as server:
        other = RedisServer(directory, unix_socket=directory / "b.sock", persistence=True)
        with pytest.raises(ConfigError, match="in use by another"):
            other.start()
        assert server.command("SET a 1") == b"+OK\r\n"
        server.kill()
        with other:
            assert other.command("GET a") == b"$1\r\n1\r\n"


def test_kept_data_with_the_name_of_a_scratch_directory_outlive_the_next_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    server = RedisServer(directory / "millrace-data", unix_socket=directory / "s", persistence=True)
    with server:
        assert server.command("SET a 1") == b"+OK\r\n"
    with scratch_directory("millrace-8180-"), server:
        assert server.command("GET a") == b"$1\r\n1\r\n"


@pytest.mark.parametrize(("blocks", "said"), [(0, "it wrote no log; the disk of .* is full"), (1, "it wrote no log")])
def test_one_that_ends_without_a_word_is_told_with_its_disk(
    directory: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, said: str
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=blocks))
    (directory / "redis.log").touch()
    with pytest.raises(ConfigError, match=f"false ended with status 1: {said}$"):
        RedisServer(directory, binary=shutil.which("false"), persistence=True).start()


@pytest.mark.parametrize(("persistence", "left"), [(True, b"$1\r\n1\r\n"), (False, b"$-1\r\n")])
def test_a_kill_leaves_what_is_kept_on_disk(directory: Path, persistence: bool, left: bytes) -> None:
    with RedisServer(directory, persistence=persistence) as server:
        assert server.command("SET a 1") == b"+OK\r\n"
        first = server.pid
        server.kill()
        assert (server.running, server.pid) == (False, None)
        server.start()
        assert server.pid not in (None, first)
        assert server.command("GET a") == left
