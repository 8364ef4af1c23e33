"""Processes of the ranks beside rank 0, as rank 0 sees them: it starts them, and ends with the first that ends or falls
silent, as they end with it. What the replica had in work another goes on with, from its journal.

A rank that hangs is found by the watchdog over rank 0's steps, which wait for it. One that is halted, or whose
interpreter is locked, is found here first, by its beats, and named.
"""

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import msgspec

from services.engine.ranks.exchange import ADVICE, Exchange, listen, make_safe, rank_device
from services.engine.ranks.orders import OrderWriter
from services.engine.ranks.pulse import PAGE, Pulse
from services.engine.ranks.ring import Writer
from services.engine.settings import EngineSettings
from shared.log import logger
from shared.model.config import ModelConfig
from shared.service import MISCONFIGURED
from shared.tether import tethered
from shared.watchdog import LAST_WORDS_S, end_process_later
from shared.workers.process import worker_environ

MODULE = "services.engine.ranks"
LOST = 40  # and the rank's number: exit status of a replica that has lost it
RING_BYTES = 64 << 20  # for the orders; a prompt of images has more, and waits
LINK_S = (
    60.0  # for the first exchanges, once all have met: NCCL looks for its ways, then ours is tried (`direct.LOOKS`)
)
LOOK_S = 0.1
CLOSE_S = 5.0  # for a rank to end when told to
CULPRIT_S = 3.0  # until the end of a rank, which has failed our step, is known

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Lost:
    """A rank that has ended or fallen silent, or rank 0 if none of them can go on."""

    rank: int
    why: str
    status: int  # with which the replica ends


class Ranks:
    """Ranks from 1 on. A context, in which rank 0 loads, and again computes; they end with it."""

    def __init__(
        self, settings: EngineSettings, environ: Mapping[str, str], lose: Callable[[Lost], None] | None = None
    ) -> None:
        """
        Args:
            environ: ours; theirs is without our settings, which have passwords.
            lose: called with the first rank that is lost; by default it ends the process.
        """
        self._settings = settings
        self._environ = environ
        self._lose = lose or end_replica
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[socket.socket] = []
        self._exchange: Exchange | None = None
        self._closing = threading.Event()
        self._silent_s = settings.step_timeout_s / 2

    def start(self, where: str, config: ModelConfig) -> Exchange:
        """Start the processes, and wait until they have come to meet us.

        The calling thread must live as long as they are to: on Linux they end with it.

        Args:
            where: the kind of device that each has one of.
            config: of the model.
        """
        size = self._settings.tensor_parallel_size
        self._memory = shared_memory(PAGE + RING_BYTES)
        shared = mmap.mmap(self._memory, PAGE + RING_BYTES)
        self._pulses = [Pulse(shared, rank) for rank in range(size)]
        ring = mmap.mmap(self._memory, RING_BYTES, offset=PAGE)
        ends = [socket.socketpair() for _ in range(1, size)]
        self._links = [ours for ours, _ in ends]
        self.orders = OrderWriter(Writer(ring, self._links))
        with listen() as meeting:
            try:
                for rank, (_, theirs) in enumerate(ends, 1):
                    self._start(rank, theirs, meeting.getsockname()[1])
            finally:
                os.close(self._memory)
                for _, theirs in ends:
                    theirs.close()
            self.orders.set_up(msgspec.json.encode(without_secrets(self._settings)))
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()
            ended, invariant = self._pulses[0].exchange, self._settings.batch_invariant
            self._exchange = Exchange(0, size, meeting, rank_device(where, 0), ended, invariant=invariant)
        why = f"the first exchange between the ranks has not ended within {LINK_S:g} s; {ADVICE}"
        limit = threading.Timer(LINK_S, self._lose, [Lost(0, why, MISCONFIGURED)])
        limit.daemon = True
        limit.start()
        try:
            self._exchange.check(self._environ, config)
        finally:
            limit.cancel()
        return self._exchange

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._processes:
            # A step fails where a rank has gone: which it was is said first, and ends this process.
            self._closing.wait(CULPRIT_S)
        self.close()

    def close(self) -> None:
        """End the ranks, and wait until they have."""
        self._closing.set()
        for link in self._links:
            link.settimeout(CLOSE_S)
        try:
            if self._processes:
                self.orders.end()
        except OSError:  # a rank has gone already: the others are told by the end of their sockets
            for link in self._links:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + CLOSE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        while self._links:
            self._links.pop().close()
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def behind(self) -> str:
        """Say where each rank is, those that are behind first."""
        progress = sorted((pulse.progress, rank) for rank, pulse in enumerate(self._pulses[1:], 1))
        told = (f"rank {rank}: {orders} orders, {exchanges} exchanges" for (orders, exchanges), rank in progress)
        return f"{'; '.join(told)}; rank 0: {self.orders.sent} orders, {self._pulses[0].progress[1]} exchanges"

    def _start(self, rank: int, link: socket.socket, port: int) -> None:
        handed = self._memory, link.fileno()
        arguments = map(str, (*handed, rank, self._settings.tensor_parallel_size, port))
        environ = worker_environ(self._environ)
        make_safe(environ)
        process = subprocess.Popen(
            tethered([sys.executable, "-P", "-m", MODULE, *arguments]),
            env=environ,
            pass_fds=handed,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from a terminal is for rank 0, which drains first
        )
        self._processes.append(process)

    def _watch(self) -> None:
        """Look at the ranks until told to stop. Our own clock stands still while this process does."""
        watched = list(zip(self._processes, self._pulses[1:], strict=True))
        beats, age = [0] * len(watched), [0.0] * len(watched)
        looked = time.monotonic()
        while not self._closing.wait(LOOK_S):
            now = time.monotonic()
            passed, looked = min(now - looked, 2 * LOOK_S), now
            for index, (process, pulse) in enumerate(watched):
                age[index] = age[index] + passed if pulse.beats == beats[index] and pulse.serving else 0.0
                beats[index] = pulse.beats
                lost = self._judge(index + 1, process, age[index])
                if lost is not None and not self._closing.is_set():
                    self._lose(lost)
                    self._closing.set()
                    return

    def _judge(self, rank: int, process: subprocess.Popen[bytes], age: float) -> Lost | None:
        """Say why a rank is lost, if it is."""
        status = process.poll()
        if status is not None:
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            return Lost(rank, f"rank {rank} is lost: {how}", status if status == MISCONFIGURED else LOST + rank)
        if 0 < self._silent_s < age:
            return Lost(rank, f"rank {rank} is lost: silent for {age:.1f} s (process {process.pid})", LOST + rank)
        return None


def shared_memory(size: int) -> int:
    """Return a descriptor of memory without a name, which is gone when the last process that has it ends."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("millrace-ranks")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor


def without_secrets(settings: EngineSettings) -> EngineSettings:
    """Return the settings for ranks, which know no Redis and none of its passwords."""
    return msgspec.structs.replace(settings, redis_url="", blob_redis_url=None)


def end_replica(lost: Lost) -> None:
    """Log which rank is lost, and end the process."""
    end_process_later(LAST_WORDS_S)
    _log.error("%s; ending this replica, so that another one takes its requests over", lost.why)
    sys.stderr.flush()
    os._exit(lost.status)
