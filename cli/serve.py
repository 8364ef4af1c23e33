"""Command `millrace serve`: Redis and the four services as processes of one machine, from start to orderly stop."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from socket import socket
from typing import Any

from prometheus_client.multiprocess import mark_process_dead
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cli import mps, signals
from cli.connection import NAMESPACE, scratch_prefix, scratch_socket
from cli.environment import COMPUTE_SERVICES, check_ports, environments, metrics_address, settings_of
from cli.flags import Launch, unread_variables
from cli.installation import how_to_install, services_are_found
from cli.output import WRITER
from cli.redis_server import RedisServer
from cli.redis_users import sign_in
from cli.refusal import Refusals
from cli.scratch import scratch_directory
from cli.supervisor import BACKOFF_S, RESTARTS, STEADY_S, Child, GaveUp
from cli.terminal import Terminal
from services.gateway.http.listener import bind
from shared import metrics
from shared.bus import leases
from shared.bus.client import connect
from shared.bus.keys import Keys
from shared.bus.pipeline_view import HELD
from shared.config import variable
from shared.errors import ConfigError
from shared.tether import tethered

# A safe path: without -P the working directory comes first on it, and a folder `shared` of somebody else's is ours.
PYTHON = (sys.executable, "-P", "-m")
METRICS = "metrics"  # in our directory in memory, or the one on disk
METRICS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own variable
SHARED_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
METRICS_BYTES = 1 << 24  # free in it, at least, for the metrics
SHARED_BYTES = 1 << 29  # free in it, at least, for embeddings to go through it: Docker gives 64 MB, four large pictures
POLL_S = (0.1, 1.0)  # between two reads of the leases: until all are ready, and then
STATUS_S = 10.0
EVERYWHERE = ("0.0.0.0", "::")  # hosts that stand for all interfaces
CLOSE_S = 10.0  # what a service may take to close, once drained
REFUSED_S = 5.0  # for which Redis takes no writes: no drain ends what needs them
LEAST_DRAIN_S = 2.0  # to drain in, for a service that is stopped after others have used the time
SAME_SIGNAL_S = 1.0  # a terminal and a `make` between us both pass on one Ctrl-C


def report(line: str) -> None:
    """Print a line for the person who started us, if there is one. (The services' logs go to standard error.)"""
    WRITER.put(sys.stdout, f"millrace: {line}\n")


def serve(launch: Launch, environ: Mapping[str, str]) -> int:
    """Run everything until told to stop, and return the exit status: 0 if all ended in order.

    Raises:
        ConfigError, CheckpointError: this launch cannot work; no service was started.
    """
    signals.end_by_exception_or_later()
    if not services_are_found():
        raise ConfigError(f"Millrace is not installed, only its source is here: {how_to_install()}")
    check_ports(launch, environ)
    for name in unread_variables(environ):
        report(f"{name} is set, but Millrace does not read it")
    if launch.demo:
        from cli.demo import write_demo  # and with it torch, which nothing else here needs

        report(f"the model is a small checkpoint with random weights, in {launch.model}/")
        write_demo(launch.model)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch_directory(scratch_prefix(launch.port)))
        redis = _own_redis(launch, directory, environ) if launch.redis_url is None else None
        in_memory = directory  # unless there is memory
        if _has_room(SHARED_MEMORY, METRICS_BYTES):
            in_memory = stack.enter_context(scratch_directory("millrace-memory-", SHARED_MEMORY))
            if _has_room(SHARED_MEMORY, SHARED_BYTES):
                environ = {variable("segments_dir"): str(in_memory / "segments"), **environ}
        environs = environments(launch, redis.url if redis else str(launch.redis_url), environ)
        for service, each in environs.items() if redis else ():
            each[variable("redis_url")] = sign_in(each[variable("redis_url")], service)
        if mps.is_wanted(environs["mm_encoder"]):
            told = stack.enter_context(mps.daemon(directory / "mps", environs["mm_encoder"]))
            for service in COMPUTE_SERVICES:
                environs[service] |= told
            report("CUDA MPS   ready; a fault of the GPU in one service ends both that use it")
        (in_memory / METRICS).mkdir()
        for each in environs.values():
            each[METRICS_DIRECTORY] = str(in_memory / METRICS)  # so that one listener, ours, shows all
        metrics_at = metrics_address(launch, environ)
        stack.callback(metrics.serve(launch.metrics_port, metrics_at, in_memory / METRICS))
        listener = stack.enter_context(bind(launch.host, launch.port))
        if redis:
            stack.enter_context(redis)
            report("redis      ready")
        system = System(launch, redis, environs, listener, metrics_at)
        status = asyncio.run(system.run())
        if redis:
            redis.stop()
            report("redis      stopped")
        for failure in system.failures:  # last, where a person looks
            report(failure)
        return status


def _has_room(memory: Path, size: int) -> bool:
    """Return True if this file system is ours to write in, and has so many bytes free."""
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        return False
    disk = os.statvfs(memory)
    return disk.f_frsize * disk.f_bavail >= size


def _own_redis(launch: Launch, scratch: Path, environ: Mapping[str, str]) -> RedisServer:
    """Make an append-only Redis, whose data outlive a crash of it. Its socket is in `scratch`, whose path is short, and
    which nobody else may enter; it has no port, which every user of this machine could reach."""
    return RedisServer(
        launch.redis_dir or scratch / "redis",
        unix_socket=scratch_socket(scratch),
        persistence=True,
        dies_with_us=True,
        namespace=environ.get(variable("namespace"), NAMESPACE),
    )


def announce(launch: Launch, metrics_host: str, has_keys: bool) -> list[str]:
    """Return what to say once all is ready: where it is, and who can reach it."""
    base = _base_url(launch.host, launch.port)
    lines = [
        f"serving {launch.model} at {base}/v1",
        f"chat page at {base}/",
        f"metrics at {_base_url(metrics_host, launch.metrics_port)}/metrics; Ctrl-C stops",
    ]
    if launch.host in ("127.0.0.1", "::1", "localhost"):
        lines.append("only this machine can reach it; --host 0.0.0.0 lets others in")
    elif not has_keys:
        where = "all interfaces" if launch.host in EVERYWHERE else launch.host
        lines.append(
            f"warning: listens on {where} without a key; --api-key KEY asks for one, --host 127.0.0.1 keeps others out"
        )
    return lines


def _base_url(host: str, port: int) -> str:
    """Return the URL by which this machine reaches what listens on `host`."""
    shown = "127.0.0.1" if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def describe(service: str, replica: leases.Replica | None) -> str:
    """Return what a service does, in a few words: its work, or that it has stopped renewing its lease."""
    if replica is None:
        return f"{service} does not answer"
    if replica.state != "ready":
        return f"{service} {replica.state}"
    return f"{service} {replica.load.get(HELD[service], 0):g}"


def _asks_for_keys(environ: Mapping[str, str]) -> bool:
    return environ.get(variable("api_keys"), "[]") != "[]" or bool(environ.get(variable("api_keys_file")))


class System:
    """Running processes of one launch."""

    def __init__(
        self,
        launch: Launch,
        redis: RedisServer | None,
        environs: dict[str, dict[str, str]],
        listener: socket,
        metrics_host: str,
    ) -> None:
        """Make one that does not run yet. Its gateways take connections from `listener`, which it closes."""
        common = settings_of(environs["gateway"])
        self._launch = launch
        self._has_keys = _asks_for_keys(environs["gateway"])
        self._metrics_host = metrics_host
        self._metrics = environs["gateway"][METRICS_DIRECTORY]
        self._redis = redis
        self._redis_url = redis.url if redis else common.redis_url
        self._keys = Keys(common.namespace)
        self._drain_s = common.drain_s
        self._drain_until = 0.0
        self._drains_in_vain = asyncio.Event()
        self._listener = listener
        self._terminal = Terminal()
        self._refusals = Refusals(report, redis.directory if redis else None)
        environs["gateway"][variable("listen_fd")] = str(listener.fileno())
        counts = {"gateway": launch.gateways}
        # By service, in the order in which they are stopped.
        self._stages = [
            [self._child(service, environ) for _ in range(counts.get(service, 1))]
            for service, environ in environs.items()
        ]
        self._children = [child for stage in self._stages for child in stage]
        self.failures: list[str] = []  # why it ended, if nobody asked it to
        self._first_signal: float | None = None
        self._announced = False
        self._killed = False
        self._stop_requested = asyncio.Event()

    def _child(self, service: str, environ: Mapping[str, str]) -> Child:
        command = tethered([*PYTHON, f"services.{service}"])
        descriptors = [self._listener.fileno()] if service == "gateway" else []
        return Child(service, command, environ, report, self._forget_gauges, descriptors)

    async def run(self) -> int:
        """Run until a signal comes or a process cannot be kept running, and return the exit status."""
        loop = asyncio.get_running_loop()
        # Not the loop's own handlers, which die with the loop: the steps after it must not be cut short either.
        signals.hand_over(lambda number, _: loop.call_soon_threadsafe(self._on_signal, number))
        tasks = [asyncio.create_task(child.run()) for child in self._children]
        redis = asyncio.create_task(self._keep_redis())
        watchers = [asyncio.create_task(each) for each in (self._watch(), self._stop_requested.wait())]
        done, _ = await asyncio.wait([*tasks, *watchers, redis], return_when=asyncio.FIRST_COMPLETED)
        failed = not self._stop_requested.is_set()
        if failed:
            self._explain(done)
        for watcher in watchers:
            watcher.cancel()
        self._drain_until = time.monotonic() + self._drain_s
        self._listener.close()  # the gateways have it too, and close theirs when they have ended their requests
        watchers.append(asyncio.create_task(self._watch_drain()))
        orderly = [all(await asyncio.gather(*map(self._stop, stage))) for stage in self._stages]
        self.failures += self._refusals.explain()
        watchers[-1].cancel()
        redis.cancel()  # only now: the services cannot end in order without it
        await asyncio.gather(*tasks, *watchers, redis, return_exceptions=True)
        signals.handle(signal.SIG_IGN)
        if self._killed:
            return 128 + signal.SIGINT
        return 0 if all(orderly) and not failed else 1

    async def _keep_redis(self) -> None:
        """Start our own Redis again whenever it dies, on the same data; with an external one, wait for ever.

        Raises:
            ConfigError: it does not start.
            GaveUp: it died too often in a row.
        """
        if self._redis is None:
            await asyncio.get_running_loop().create_future()
            return
        quick, started = 0, time.monotonic()
        while True:
            while self._redis.running:  # noqa: ASYNC110  # its process has no event to wait for
                await asyncio.sleep(POLL_S[0])
            quick = 1 if time.monotonic() - started >= STEADY_S else quick + 1
            if quick > RESTARTS:
                raise GaveUp(f"redis ended by itself, for the {quick}th time in a row")
            delay = 0.0 if quick == 1 else min(BACKOFF_S[0] * 2 ** (quick - 2), BACKOFF_S[1])
            report("redis ended by itself; starting it again on the data it has on disk")
            await asyncio.sleep(delay)
            started = time.monotonic()
            self._redis.spawn()  # not in another thread, with whose end it would be killed
            await asyncio.to_thread(self._redis.wait_until_ready)
            report(f"redis      ready after {time.monotonic() - started:.1f} s")

    async def _watch(self) -> None:
        """Report when a stage becomes ready, and the load of each whenever it has changed; end if the terminal has."""
        client = connect(self._redis_url)
        reported, reported_at = "", time.monotonic()
        try:
            while True:
                if self._terminal.was_closed() and not signals.kept_by_nohup():
                    self._on_signal(signal.SIGHUP)
                # The services ride out an outage of an external Redis; it is no reason to end them.
                with contextlib.suppress(RedisError):
                    await self._refusals.look(client, self._keys)
                    status = await self._observe(client)
                    if status and status != reported and time.monotonic() - reported_at >= STATUS_S:
                        report(status)
                        reported, reported_at = status, time.monotonic()
                await asyncio.sleep(POLL_S[self._all_ready])
        finally:
            self._terminal.close()
            await client.aclose()

    async def _watch_drain(self) -> None:
        """Give requests that cannot end, since Redis takes no writes, no more time to."""
        client = connect(self._redis_url)
        try:
            await self._refusals.wait_until_lasting(client, self._keys, REFUSED_S, POLL_S[0])
            report("requests under way are not waited for, as they cannot end while redis takes no writes")
            self._drains_in_vain.set()
        finally:
            await client.aclose()

    async def _observe(self, client: Redis) -> str:
        """Note which stages are ready; return the load of all in one line, or "" until all are ready."""
        doing = []
        for child in self._children:
            living = {replica.name: replica for replica in await leases.live(client, self._keys, child.service)}
            replica = living.get(child.name)
            if replica is not None and replica.state == "ready" and not child.ready:
                child.mark_ready()
                self._say_ready(child)
            doing.append(describe(child.service, replica))
        return f"in work: {', '.join(doing)}" if self._all_ready else ""

    def _say_ready(self, child: Child) -> None:
        report(f"{child.service:10} ready after {child.age_s:.1f} s")
        if self._all_ready and not self._announced:  # a child that was started again says no more than that it is ready
            self._announced = True
            for line in announce(self._launch, self._metrics_host, self._has_keys):
                report(line)

    @property
    def _all_ready(self) -> bool:
        return all(child.ready for child in self._children)

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            self._stop_requested.set()
            report("stopping, once running requests have been answered; a second Ctrl-C stops at once")
        elif number != signal.SIGHUP and now - self._first_signal >= SAME_SIGNAL_S:  # a closed terminal says so twice
            self._killed = True
            self._kill_all()

    def _forget_gauges(self, pid: int) -> None:
        """Drop the gauges of a process that has ended; its counters stand."""
        mark_process_dead(pid, self._metrics)  # type: ignore[no-untyped-call]

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill()

    def _explain(self, done: set[asyncio.Task[Any]]) -> None:
        for task in done:
            if error := task.exception():
                self.failures.append(f"{error}" or type(error).__name__)
                report(f"{error.what if isinstance(error, GaveUp) else self.failures[-1]}; stopping all")
        if self._redis and not self._redis.running:
            report("without Redis nothing can end in order; ending the remaining processes at once")
            self._kill_all()

    async def _stop(self, child: Child) -> bool:
        orderly = await child.stop(
            max(self._drain_until, time.monotonic() + LEAST_DRAIN_S), CLOSE_S, self._drains_in_vain
        )
        report(f"{child.service:10} {'stopped' if orderly else f'did not stop in order: it {child.ending}'}")
        return orderly
