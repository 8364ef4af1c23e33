"""Process of a service: its settings, what it tells of itself, and the signals that end it.

SIGTERM or SIGINT stops its life (shared/service.py), and a second one the process, at once. SIGUSR1 ends the draining.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, TypeVar

from redis.asyncio import Redis

from shared import config, crash_points, fingerprint, log, metrics, tracing
from shared.bus.client import connect
from shared.collector import keep_from_collector
from shared.config import CommonSettings
from shared.errors import CheckpointError, ConfigError
from shared.service import MISCONFIGURED, Life, Service
from shared.tracing import Tracing
from shared.visible import visible_lines

_log = log.logger(__name__)

S = TypeVar("S", bound=CommonSettings)
S_contra = TypeVar("S_contra", bound=CommonSettings, contravariant=True)


class Build(Protocol[S_contra]):
    """Function that builds a service from its settings."""

    def __call__(self, settings: S_contra, redis: Redis, *, tracing: Tracing) -> Service: ...


def launch(
    name: str,
    settings: type[S],
    build: Build[S],
    environ: Mapping[str, str],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Load settings, set up logs, metrics, traces and Redis, `build` the service and `run` it: all of a `__main__`.

    `name` is the service's ("engine"); the replica's is `settings.name`.
    Returns the process's exit status: MISCONFIGURED, with a line that says why, if the operator can correct it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until somebody handles it, it would end us
    try:
        loaded = config.load(settings, environ)
        log.setup(name, loaded.name, loaded.log_level)
        crash_points.arm(loaded.crash_at)
        metrics.serve(loaded.metrics_port, loaded.metrics_host)
        redis = connect(loaded.redis_url, loaded.auth_patience_s)
        traces = tracing.start(name, loaded)
        service = build(loaded, redis, tracing=traces)
        agreed = fingerprint.facts(loaded)
    except (ConfigError, CheckpointError) as error:
        print(f"{name}: {visible_lines(str(error))}", file=sys.stderr)
        return MISCONFIGURED
    try:
        return run(name, service, loaded, redis, loop_factory, agreed)
    finally:
        traces.close()


def run(
    name: str,
    service: Service,
    settings: CommonSettings,
    redis: Redis,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run a service through all phases, until a signal stops it; close `redis`. Returns the process's exit status."""

    async def live() -> int:
        life = Life(name, service, settings, redis, facts, keep_from_collector)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _on_signal, life, number)
        # Not a handler of the loop, which has the signal end us as soon as it is closed.
        signal.signal(signal.SIGUSR1, lambda *_: _on_end_drain(life, loop))
        signal.siginterrupt(signal.SIGUSR1, False)  # as the loop does for its own
        try:
            return await life.run()
        finally:
            await redis.aclose()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        status = runner.run(live())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # stays while the interpreter is torn down, as no handler does
    return status


def _on_signal(life: Life, number: int) -> None:
    if life.stop.is_set():
        _log.warning("second signal; ending at once")
        os._exit(128 + number)
    life.stop.set()


def _on_end_drain(life: Life, loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(life.end_drain)
