"""Connections of clients: how many there may be in all and from one address, and how long one may wait for its client.

A connection that waits for its client (idle, within a head, or for the rest of a body that nobody reads) makes room for
a new one when there are too many. Where none waits, a few more are let in, to be told so; health checks are answered.
"""

import resource
import time
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address
from typing import Protocol

import msgspec
from prometheus_client import Counter, Gauge

from shared.errors import Failure

HEALTH_ROOM = 64  # connections beyond the limit, whose requests are refused unless they ask for health
_IPV6_NETWORK_BYTES = 8  # of an address: who has one has them all

FULL = Failure(503, "The server has too many connections.", type="server_error", code="too_many_connections")
ADDRESS_FULL = Failure(
    429, "There are too many connections from this address.", type="rate_limit_error", code="too_many_connections"
)


class Connection(Protocol):
    """Connection as its registry sees it."""

    address: str

    def abort(self) -> None:
        """Close it at once."""

    def has_left(self) -> bool:
        """Return True if a client that sends nothing more does not read either, as far as is known."""


class ConnectionLimits(msgspec.Struct, frozen=True):
    """Limits on connections."""

    total: int
    per_address: int
    head_s: float  # for a request's head, and for a rest that nobody reads
    idle_s: float  # between requests, and before the first


class Connections:
    """Registry of the open connections."""

    def __init__(self, limits: ConnectionLimits, gauge: Gauge, closed: Counter) -> None:
        """Keep the limits. `gauge` shows how many are open, `closed` counts those that we close, by reason."""
        self.limits = limits
        self._gauge = gauge
        self._closed = closed
        self._by_address: dict[str, dict[Connection, None]] = {}
        self._count = 0
        self._half_closed: dict[Connection, None] = {}  # their clients send nothing more
        self._deadlines: dict[Connection, float] = {}  # of those that wait, the longest waiting first

    def enter(self, connection: Connection) -> Failure | None:
        """Add a connection, which may end another that waits. Returns what its requests are refused with, if they are.

        Where there is no room to say so it is closed.
        """
        peers = self._by_address.get(connection.address, {})
        refusal = None
        if len(peers) >= self.limits.per_address and not self._evict(peers):
            refusal = ADDRESS_FULL
        elif self._count >= self.limits.total and not self._evict(self._deadlines):
            refusal = FULL
        # Not `peers`: whoever made room may have been the last of this address, which is forgotten with it.
        self._by_address.setdefault(connection.address, {})[connection] = None
        self._change(1)
        if refusal is not None:
            self._closed.labels("refused").inc()
            if self._count > self.limits.total + HEALTH_ROOM:
                connection.abort()
        return refusal

    def leave(self, connection: Connection) -> None:
        """Remove a connection; nothing happens if it has been."""
        self._deadlines.pop(connection, None)
        self._half_closed.pop(connection, None)
        peers = self._by_address.get(connection.address, {})
        if connection in peers:
            del peers[connection]
            if not peers:
                del self._by_address[connection.address]
            self._change(-1)

    def wait(self, connection: Connection, seconds: float) -> None:
        """Have a connection wait for its client, so long at the most."""
        self._deadlines.pop(connection, None)
        if connection in self._by_address.get(connection.address, {}):
            self._deadlines[connection] = time.monotonic() + seconds

    def work(self, connection: Connection) -> None:
        """Have a connection wait no longer: its client waits for us."""
        self._deadlines.pop(connection, None)

    def watch(self, connection: Connection) -> None:
        """Look from now on whether the client of a half-closed connection has left."""
        self._half_closed[connection] = None

    def close_overdue(self) -> None:
        """Close the connections that have waited too long, and those of clients that have left."""
        for connection in [each for each in self._half_closed if each.has_left()]:
            self.leave(connection)
            connection.abort()
        now = time.monotonic()
        for connection in [each for each, deadline in self._deadlines.items() if deadline <= now]:
            self._close(connection, "timeout")

    def close_invalid(self, connection: Connection) -> None:
        """Close a connection on which something came that is no HTTP, and cannot be answered any more."""
        self._close(connection, "invalid")

    def _evict(self, among: Iterable[Connection]) -> bool:
        """Close the first of these that waits; return False if none does."""
        waiting = next((each for each in among if each in self._deadlines), None)
        if waiting is None:
            return False
        self._close(waiting, "evicted")
        return True

    def _close(self, connection: Connection, reason: str) -> None:
        self._closed.labels(reason).inc()
        self.leave(connection)
        connection.abort()

    def _change(self, count: int) -> None:
        self._count += count
        self._gauge.set(self._count)


def network_of(host: str) -> str:
    """Return the address by which a client is counted: of IPv6 the network of 64 bits."""
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        return str(IPv6Address(address.packed[:_IPV6_NETWORK_BYTES] + bytes(_IPV6_NETWORK_BYTES)))
    return host


def affordable_connections(wanted: int) -> int:
    """Return how many connections there may be: a quarter of all files is left for Redis and everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft * 3 // 4 - HEALTH_ROOM))
