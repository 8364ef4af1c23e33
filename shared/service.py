"""The life of every service, in named phases: startup, serve, drain, close.

SIGTERM or SIGINT (or a Drain message that names this replica) ends `serve`; `drain` has `drain_s` seconds to finish
what is running; `close` always runs. The lease is renewed from the end of startup until close, by a task of its own.
"""

from typing import Protocol


class Service(Protocol):
    """What a service implements; `run` calls the phases in order."""

    name: str

    async def startup(self) -> None: ...

    async def serve(self) -> None:
        """Work until cancelled."""

    async def drain(self) -> None:
        """Take nothing new; return when nothing runs."""

    async def close(self) -> None: ...

    def load(self) -> dict[str, float]:
        """Figures for the lease's status."""


def run(service: Service) -> int:
    """Run to the end; returns the process's exit status. A failed task of the service ends it with status 1."""
    raise NotImplementedError
