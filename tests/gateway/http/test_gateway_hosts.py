"""Names under which a server without keys answers on its own machine."""

import socket

import pytest

from services.gateway.http.hosts import KnownHosts

OURS = {"server": ("127.0.0.1", 8180)}


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8180",
        "evil.example",
        "EVIL.EXAMPLE.",
        "127.0.0.1.evil.example",
        "localhost.evil.example.",
        "1.2.3",
        "mylocal.example",
        "internal.example",
    ],
)
def test_names_of_strangers(host: str) -> None:
    for server in (("127.0.0.1", 8180), ("::1", 8180), ("127.8.8.8", 8180), ("::ffff:127.0.0.1", 8180)):
        assert KnownHosts(()).refuses({"server": server}, host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "127.0.0.1:8180",
        "192.168.1.4",
        "[::1]:8180",
        "localhost:8180",
        "LocalHost.",
        "millrace",
        "demo.localhost:8180",
        "printer.local",
        "host.docker.internal:8180",
        "chat.example.org:8180",
        socket.gethostname(),
    ],
)
def test_names_that_are_no_strangers(host: str) -> None:
    assert not KnownHosts(("https://chat.example.org", "http://localhost:3000")).refuses(OURS, host)


def test_from_other_machines_and_where_every_page_may_call_any_name_will_do() -> None:
    for server in (("10.0.0.7", 8180), ("2001:db8::1", 8180), None, ("/run/millrace.sock", None)):
        assert not KnownHosts(()).refuses({"server": server}, "evil.example")
    assert not KnownHosts(("*",)).refuses(OURS, "evil.example")
