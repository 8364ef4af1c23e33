"""The embedded Redis dies and comes back, with its data or without."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.redis_server import RedisServer


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="millrace-") as name:
        yield Path(name)


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
