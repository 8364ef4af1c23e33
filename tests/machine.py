"""Assumptions of tests about the machine they run on: next to none, since it may be slow, busy and shared."""

import itertools
import os
import random
import socket
from pathlib import Path

# Timeout of waits that end at once on a quiet machine: only a test that fails waits this long.
PATIENCE_S = 180.0
PATIENCE_MS = round(PATIENCE_S * 1000)


def _ports() -> list[int]:
    """Return the ports that this process gives, in an order that other runs on this machine hardly have.

    They are below those (32768 and up) that Linux gives to connections and to listeners that ask for any port. Workers
    of pytest-xdist share them out.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = range(20_000 + worker % workers, 32_768, workers)
    return random.SystemRandom().sample(ports, len(ports))


# Each is given once before any is given again.
_candidates = itertools.cycle(_ports())


def has_reproducible_products() -> bool:
    """Return whether sums must not depend on the rows beside (shared/reproducible.py): the processors that were tried.

    Elsewhere an engine says at its start whether they do, and nothing is promised.
    """
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "GenuineIntel" in flags and "avx512f" in flags


def free_ports(count: int) -> list[int]:
    """Return loopback ports that are free, and that nobody else should take before they are used."""
    probes = []
    try:
        while len(probes) < count:
            probe = socket.socket()
            try:
                probe.bind(("127.0.0.1", next(_candidates)))
            except OSError:
                probe.close()
                continue
            probes.append(probe)
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def free_port() -> int:
    """Return one such port."""
    [port] = free_ports(1)
    return port
