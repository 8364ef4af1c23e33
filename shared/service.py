"""Life cycle of every service, in named phases: startup, serve, drain, close.

SIGTERM or SIGINT (or a Drain message that names this replica) cancels `serve`, or `startup`; `drain` then has
`drain_s` seconds to finish what is running, or until a SIGUSR1 comes; `close` always runs. A second SIGTERM or SIGINT
ends the process at once. The lease is written before startup, so that no entry is ever read without one, renewed by a
task of its own, and released after close. A failed task of the service, or a `serve` that returns by itself, ends the
process with status 1.
"""

import asyncio
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Protocol, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared import config, crash_points, fingerprint, log, metrics, tracing
from shared.bus.client import MAX_BLOCK_MS, connect, suspect
from shared.bus.eviction import check_eviction
from shared.bus.keys import Keys
from shared.bus.leases import UNREADABLE, Difference, Lease
from shared.bus.lua import load_scripts
from shared.bus.retry import retry_until_available
from shared.bus.streams import LogReader
from shared.bus.translation import holds_newer, translate_entries, translate_records
from shared.config import CommonSettings
from shared.errors import CheckpointError, ConfigError
from shared.message_versions import OLDEST, VERSION, WRITES
from shared.messages import Drain
from shared.redis_errors import SignInError
from shared.tracing import Tracing
from shared.version import MILLRACE_VERSION
from shared.visible import visible_lines

FAILED = 1
MISCONFIGURED = 2  # starting it again would not help
_RETRY_S = 1.0
RAISE_AFTER = 10  # leases without a replica that needs an older version
DEAD_AFTER = 1.5  # leases without a renewal, after which nobody can still be alive
TOGETHER_S = 0.1  # signals that come together are delivered in any order

_log = log.logger(__name__)
S = TypeVar("S", bound=CommonSettings)
S_contra = TypeVar("S_contra", bound=CommonSettings, contravariant=True)


class Service(Protocol):
    """Interface of a service; `Life` calls the phases in order. `close` may follow a startup that did not finish."""

    async def startup(self) -> None: ...

    async def serve(self) -> None:
        """Work until cancelled. An exception ends the process; the service watches its own tasks."""

    async def drain(self) -> None:
        """Read nothing new; return when nothing runs. Cancelled when `drain_s` is over."""

    async def close(self) -> None: ...

    def load(self) -> dict[str, float]:
        """Return the load that the lease publishes, by name."""


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


def keep_from_collector() -> None:
    """Let the garbage collector never look at what is there already, which stays: a look takes an engine 0.2 s."""
    gc.collect()
    gc.freeze()


class Life:
    """Life cycle of one service in one event loop. Set `stop` to end it.

    `facts` are those on which it must agree with every replica that lives; `when_started` is called before it is ready.
    """

    def __init__(
        self,
        name: str,
        service: Service,
        settings: CommonSettings,
        redis: Redis,
        facts: Mapping[str, str] = MappingProxyType({}),
        when_started: Callable[[], None] = lambda: None,
    ) -> None:
        keys = Keys(settings.namespace)
        self.stop = asyncio.Event()
        self._service = service
        self._when_started = when_started
        self._me = Drain(name, settings.name)
        self._redis = redis
        self._keys = keys
        self._control = keys.control()
        about = (MILLRACE_VERSION, time.time(), facts)
        self._lease = Lease(redis, keys, name, settings.name, settings.lease_ms, *about)
        self._facts = facts
        self._joined = False
        self._lease_s = settings.lease_ms / 1000
        self._renew_s = settings.lease_ms / 3000
        self._renewal_s = max(_RETRY_S, settings.lease_ms / 2000)
        self._raise_after_s = RAISE_AFTER * settings.lease_ms / 1000
        self._dead_after_s = DEAD_AFTER * settings.lease_ms / 1000
        self._drain_s = settings.drain_s
        self._draining: asyncio.Timeout | None = None
        self._shards = range(settings.shards)
        self._renewed_at = -math.inf
        self._translated = True
        self._state = "starting"

    async def run(self) -> int:
        """Run all phases; return the exit status. Every failure is logged here."""
        status = 0
        try:
            async with asyncio.TaskGroup() as group:
                loops = (self._keep_renewing(), self._keep_settling(), self._listen())
                background = [group.create_task(each) for each in loops]
                await self._phases()
                for task in background:
                    task.cancel()
        except* (ConfigError, CheckpointError) as errors:
            status = MISCONFIGURED
            _log.error("cannot start", extra={"reason": "; ".join(map(str, _leaves(errors)))})
        except* SignInError as errors:
            status = FAILED
            _log.error("Redis lets us in no more", extra={"reason": str(next(_leaves(errors)))})
        except* Exception as errors:
            status = FAILED
            _log.error("failed", exc_info=errors)
        return await self._close() or status

    async def _phases(self) -> None:
        if await self._stopped_during(self._join()):
            return
        if await self._stopped_during(self._service.startup()):
            return
        if await self._stopped_during(retry_until_available("scripts", lambda: load_scripts(self._redis))):
            return
        self._when_started()
        await self._enter("ready")
        if not await self._stopped_during(self._service.serve()):
            raise RuntimeError("serve returned although nothing had stopped it")
        await self._enter("draining")
        await self._drain()

    async def _join(self) -> None:
        """Write the first lease. A fleet that has just been killed may leave leases behind that differ; wait for these.

        Raises:
            ConfigError: replicas that live differ from this one, or Redis may evict what they need.
        """
        _log.info(self._state)
        await retry_until_available("eviction", lambda: check_eviction(self._redis))
        give_up_at = time.monotonic() + self._dead_after_s
        while differences := await retry_until_available("join", lambda: self._lease.join(self._state)):
            if time.monotonic() >= give_up_at:
                raise ConfigError(_differing(differences, self._facts))
            await asyncio.sleep(self._renew_s)
        self._joined = True
        await self._await_older_version()

    async def _await_older_version(self) -> None:
        """Wait until those that live write nothing of a newer version any more, and have translated what they wrote.

        Raises:
            ConfigError: a living replica and this one read no version in common.
        """
        newest = VERSION
        joined = newer_at = newer_postproc_at = time.monotonic()
        while True:
            fleet = await retry_until_available("fleet", self._lease.fleet)
            for replica in fleet:
                if replica.state != UNREADABLE and (replica.newest < OLDEST or replica.oldest > VERSION):
                    raise ConfigError(
                        f"this replica reads versions {OLDEST} to {VERSION} of our messages, and {replica.service}:"
                        f"{replica.name} {replica.oldest} to {replica.newest}; upgrade by one version at a time"
                    )
            now = time.monotonic()
            newer_services = {replica.service for replica in fleet if replica.newest > VERSION}
            newest = max([newest, *(replica.newest for replica in fleet)])
            newer_at = now if newer_services else newer_at
            newer_postproc_at = now if "postproc" in newer_services else newer_postproc_at
            # Those that were seen and are not may only be late with their leases.
            if newest == VERSION or now - newer_at > self._dead_after_s:
                return
            if all(replica.writes <= VERSION for replica in fleet):
                newer = range(VERSION + 1, newest + 1)
                # Tokens become readable by being journaled, unless all who could read them are dead.
                shards = self._shards if now - newer_postproc_at < self._dead_after_s else ()
                look = partial(holds_newer, self._redis, self._keys, shards, newer)
                if not await retry_until_available("newer", look):
                    return
                if now - joined >= self._raise_after_s:
                    _log.error("newer replicas do not translate what they wrote; its requests will fail if they die")
                    return
            await asyncio.sleep(self._renew_s / 2)

    async def _settle_version(self) -> None:
        """Write the newest version that everybody reads.

        What is kept in a newer one is translated before we say so, and again until all say so. What we had begun to
        write in a newer one has to be written by then.
        """
        before, seen_until = WRITES.settled, self._renewed_at + self._lease_s
        fleet = await self._lease.fleet()
        needed = min([VERSION, *(replica.newest for replica in fleet)])
        if WRITES.settle(needed, time.monotonic(), self._raise_after_s):
            self._translated = False
        WRITES.trusted_until = seen_until
        if WRITES.settled != before:
            _log.info("another version of messages is written", extra={"version": WRITES.settled})
        announced = WRITES.announced
        if not self._translated:
            await translate_records(self._redis, self._keys)
            await translate_entries(self._redis, self._keys, self._me.service, self._me.replica)
            self._translated = max([announced, *(replica.writes for replica in fleet)]) <= WRITES.settled
        if WRITES.said != announced:
            WRITES.said, self._lease.writes = 0, announced
            await self._lease.renew(self._state)
            WRITES.said = announced

    async def _stopped_during(self, phase: Coroutine[None, None, None]) -> bool:
        """Run a phase to its end, or cancel it when `stop` is set; return whether it is."""
        work, stopping = asyncio.create_task(phase), asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            stopping.cancel()
            await asyncio.wait({work, stopping})
        if not work.cancelled():
            work.result()
        return self.stop.is_set()

    def end_drain(self) -> None:
        """Give what is running no more time to finish, if `stop` is set; if it is not, nothing drains."""
        if self.stop.is_set():
            self._end_drain()
        else:
            asyncio.get_running_loop().call_later(TOGETHER_S, self._end_drain)

    def _end_drain(self) -> None:
        if not self.stop.is_set():
            return
        self._drain_s = 0.0
        if self._draining is not None and not self._draining.expired():
            self._draining.reschedule(asyncio.get_running_loop().time())

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._drain_s) as limit:
                self._draining = limit
                try:
                    await self._service.drain()
                finally:
                    self._draining = None
        except TimeoutError:
            if not limit.expired():
                raise
            _log.warning(
                "not drained within drain_s; other replicas claim the requests that are left",
                extra=self._service.load(),
            )

    async def _close(self) -> int:
        """Close the service and release the lease, even if either fails."""
        status = 0
        try:
            await self._service.close()
        except Exception:
            _log.exception("close failed")
            status = FAILED
        if not self._joined:
            return status
        try:
            async with asyncio.timeout(self._renewal_s):
                await self._lease.release()
        except TimeoutError:
            _log.warning("lease not released; it will expire", extra={"reason": "no answer in time"})
        except RedisError as error:
            _log.warning("lease not released; it will expire", extra={"reason": str(error)})
        return status

    async def _enter(self, state: str) -> None:
        self._state = state
        _log.info(state)
        await self._renew()

    async def _keep_renewing(self) -> None:
        """Renew the lease three times in its length; at once if a renewal got no answer in half of that."""
        while True:
            await asyncio.sleep(self._renew_s)
            while not await self._renew():
                suspect(self._redis)

    async def _keep_settling(self) -> None:
        """Settle the version of messages as often; beside the lease, as there may be much to translate."""
        while OLDEST < VERSION:
            await asyncio.sleep(self._renew_s)
            try:
                if self._joined:
                    await self._settle_version()
            except SignInError:
                raise
            except RedisError as error:
                _log.warning("version of messages not settled", extra={"reason": str(error)})

    async def _renew(self) -> bool:
        """Return False if there was no answer in time."""
        if not self._joined:
            return True
        load = {} if self._state == "starting" else self._service.load()
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._renewal_s):
                await self._lease.renew(self._state, load)
            self._renewed_at = began
        except SignInError:
            raise
        except TimeoutError:
            _log.warning("lease not renewed", extra={"reason": "no answer in time"})
            return False
        except RedisError as error:
            _log.warning("lease not renewed", extra={"reason": str(error)})
        return True

    async def _listen(self) -> None:
        """Stop when a Drain message names us."""
        control = LogReader(self._redis, {self._control: "$"})
        while True:
            try:
                messages = await control.read(100, MAX_BLOCK_MS)
            except RedisError as error:
                _log.warning("control not read", extra={"reason": str(error)})
                await asyncio.sleep(_RETRY_S)
                continue
            if any(message == self._me for _, _, message in messages):
                self.stop.set()


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)


def _differing(differences: Sequence[Difference], facts: Mapping[str, str]) -> str:
    first, others = differences[0], len({each.replica for each in differences}) - 1
    names = ", ".join(sorted({each.fact for each in differences}))
    more = f" (and {others} more)" if others else ""
    return (
        f"this replica differs from the living ones in {names}: {first.fact} is {facts[first.fact]} here and "
        f"{first.value} at {first.replica}{more}. All replicas of a deployment must agree; to change it, see "
        "docs/operations.md, 'Change what all must agree on'"
    )


def _on_signal(life: Life, number: int) -> None:
    if life.stop.is_set():
        _log.warning("second signal; ending at once")
        os._exit(128 + number)
    life.stop.set()


def _on_end_drain(life: Life, loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(life.end_drain)
