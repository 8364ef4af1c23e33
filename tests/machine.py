"""What tests assume of the machine they run on: next to nothing, for it may be slow, busy, and shared."""

import random
import socket

# For what comes at once on a quiet machine: only a test that fails waits this long, and its length says nothing.
PATIENCE_S = 180.0
PATIENCE_MS = round(PATIENCE_S * 1000)

_random = random.SystemRandom()


def free_ports(count: int) -> list[int]:
    """Loopback ports where nobody listens, below those (32768 and up) that Linux gives to connections and to listeners
    that ask for any port: one of these could be taken before it is used."""
    probes = []
    try:
        while len(probes) < count:
            probe = socket.socket()
            try:
                probe.bind(("127.0.0.1", _random.randrange(20_000, 32_768)))
            except OSError:
                probe.close()
                continue
            probes.append(probe)
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def free_port() -> int:
    """One such port."""
    [port] = free_ports(1)
    return port
