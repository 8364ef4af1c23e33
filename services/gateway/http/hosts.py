"""Names that a server without keys is called by on its own machine, against DNS rebinding.

The name of a stranger's web page may stand for 127.0.0.1, or for another address of this machine, once the page is
loaded. Its browser then takes us for the page's own server, and lets the page ask and read as it likes. What gives it
away is its name, in the Host header.
"""

import socket
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.types import Scope

from shared.errors import Failure

HOSTS_FILE = Path("/etc/hosts")  # the machine's own names, which no name server can give to another address

# Names below these are nobody's to register, and so no stranger's. Kubernetes has `service.namespace.svc`.
_PRIVATE = ("localhost", "local", "internal", "lan", "test", "home.arpa", "svc")

STRANGE_HOST = Failure(
    403,
    "The Host header names a server that this one is not known as. Without API keys, programs of this machine call it "
    "by an address, a name of this machine or one of `allowed_origins`: else pages of strangers could read its "
    "answers.",
    param="Host",
    code="host_not_allowed",
)


class KnownHosts:
    """Names under which programs of this machine may reach us: its own, and those of pages that may call us."""

    def __init__(self, origins: Iterable[str], hosts_file: Path = HOSTS_FILE) -> None:
        """Read the machine's names, once. No name server is asked."""
        origins = tuple(origins)
        self._all = "*" in origins
        self._names = {name for origin in origins if (name := _name(urlsplit(origin).netloc))}
        self._names |= {_name(socket.gethostname()), *_names_in(hosts_file)}

    def refuses(self, scope: Scope, host: str) -> bool:
        """Return True if a request came from this machine under a name that may be a stranger's."""
        return _is_from_here(scope) and not self._knows(_name(host))

    def _knows(self, name: str) -> bool:
        if self._all or "." not in name or name in self._names or _is_address(name):
            return True
        return any(name.endswith(f".{private}") for private in _PRIVATE)


def _is_from_here(scope: Scope) -> bool:
    """Return True if the client is a program of this machine, by whichever of the machine's addresses it came.

    To an address of the machine itself its programs come from that same address.
    """
    server, client = scope.get("server"), scope.get("client")
    if server is None:
        return False
    return _is_loopback(server[0]) or (client is not None and client[0] == server[0])


def _names_in(hosts_file: Path) -> set[str]:
    """Return the names in a file like /etc/hosts; none if it cannot be read.

    Those of 0.0.0.0 and :: are left out: lists of servers that are to be blocked, which are strangers', write them so.
    """
    try:
        text = hosts_file.read_text(errors="replace")
    except OSError:
        return set()
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    return {_name(name) for address, *names in filter(None, lines) if _is_specified(address) for name in names}


def _is_specified(address: str) -> bool:
    return _is_address(address) and not ip_address(address).is_unspecified


def _name(host: str) -> str:
    """Return the host without its port: an address or a name."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
