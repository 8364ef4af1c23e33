"""Names under which a server without keys answers on its own machine."""

import socket
from pathlib import Path

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
        "millrace.models.svc:8180",
        "host.docker.internal:8180",
        "chat.example.org:8180",
        socket.gethostname(),
    ],
)
def test_names_that_are_no_strangers(host: str) -> None:
    assert not KnownHosts(("https://chat.example.org", "http://localhost:3000")).refuses(OURS, host)


@pytest.mark.parametrize("address", ["192.168.1.4", "2001:db8::7", "::ffff:192.168.1.4"])
def test_names_of_strangers_by_an_address_that_is_not_loopback(address: str) -> None:
    """A name may be made to stand for the machine's address in its network, on which `millrace serve` listens too."""
    scope = {"server": (address, 8180), "client": (address, 40000)}
    assert KnownHosts(()).refuses(scope, "evil.example:8180")
    assert not KnownHosts(()).refuses(scope, f"[{address}]:8180" if ":" in address else f"{address}:8180")


def test_names_in_the_hosts_file_are_this_machines(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_bytes(
        b"# 127.0.0.1 comment.example\n127.0.0.1\tlocalhost\n\n127.0.1.1 vm.Example.org vm # other.example\n"
        b"0.0.0.0 ads.example\n:: tracker.example\nnonsense words.example\n"
        b"10.0.0.9 \xff\xfe box.example.\n192.168.1.9\n"
    )
    known = KnownHosts((), hosts)
    assert not any(known.refuses(OURS, name) for name in ("vm.example.org:8180", "VM.example.org.", "box.example"))
    strangers = ("comment.example", "other.example", "ads.example", "tracker.example", "words.example")
    assert all(known.refuses(OURS, name) for name in strangers)
    assert KnownHosts((), tmp_path / "none").refuses(OURS, "vm.example.org")


def test_from_other_machines_and_where_every_page_may_call_any_name_will_do() -> None:
    for server in (("10.0.0.7", 8180), ("2001:db8::1", 8180), None, ("/run/millrace.sock", None)):
        for client in (("10.0.0.8", 40000), None):
            assert not KnownHosts(()).refuses({"server": server, "client": client}, "evil.example")
    assert not KnownHosts(("*",)).refuses(OURS, "evil.example")
