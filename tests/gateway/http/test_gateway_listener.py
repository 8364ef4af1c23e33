"""Sockets that the API listens on."""

import socket
from pathlib import Path

import pytest

from services.gateway.http.listener import bind, inherited
from shared.errors import ConfigError


def test_a_socket_that_was_handed_down_is_the_one_that_listens() -> None:
    with bind("127.0.0.1", 0) as ours, inherited(socket.socket.dup(ours).detach()) as theirs:
        assert theirs.getsockname() == ours.getsockname()
        ours.close()
        with socket.create_connection(theirs.getsockname()):
            theirs.accept()[0].close()


def test_a_descriptor_that_is_no_socket_is_named(tmp_path: Path) -> None:
    with (
        (tmp_path / "file").open("w") as file,
        pytest.raises(ConfigError, match=r"MILLRACE_LISTEN_FD: \d+ is no socket"),
    ):
        inherited(file.fileno())
