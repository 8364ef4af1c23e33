"""Life cycle of the gateway: its tasks run from startup to close, since answers still arrive while it drains."""

import asyncio
from collections.abc import Coroutine, Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.gateway.batches.runner import BatchRunner
from services.gateway.errors import SHUTTING_DOWN
from services.gateway.grammars.check import GrammarCheck
from services.gateway.http.admission import Admission
from services.gateway.http.server import CLOSE_S, Server
from services.gateway.inflight.inbox import Inbox
from services.gateway.inflight.registry import OpenRequests
from services.gateway.metrics import GatewayMetrics
from services.gateway.templates.renderer import TemplateRenderer
from services.gateway.tenants.keyring import Keyring
from services.gateway.tenants.limiter import Limiter
from shared import log

SERVICE = "gateway"

logger = log.logger(__name__)


class Gateway:
    """Gateway service, run by `shared.launch`."""

    name = SERVICE

    def __init__(
        self,
        *,
        own_clients: Sequence[Redis],
        admission: Admission,
        templates: TemplateRenderer,
        grammars: GrammarCheck,
        open_requests: OpenRequests,
        keyring: Keyring,
        limiter: Limiter,
        batches: BatchRunner,
        inbox: Inbox,
        server: Server,
        metrics: GatewayMetrics,
        tick_s: float,
        watch_s: float,
    ) -> None:
        """Assemble the service.

        `own_clients` are closed with it. `tick_s` is the interval between checks of deadlines, silent streams and the
        key file, `watch_s` that between checks that Redis still has the open requests.
        """
        self._own_clients = own_clients
        self._admission = admission
        self._templates = templates
        self._grammars = grammars
        self._open_requests = open_requests
        self._keyring = keyring
        self._limiter = limiter
        self._batches = batches
        self._inbox = inbox
        self._server = server
        self._metrics = metrics
        self._tick_s = tick_s
        self._watch_s = watch_s
        self._serving: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self) -> None:
        """Read answers, then accept clients.

        Raises:
            CheckpointError: the chat template does not compile.
        """
        await self._templates.start()
        await self._inbox.create()
        work = {"inbox": self._inbox.run(), "watch": self._inbox.watch(self._watch_s), "clock": self._tick()}
        work |= {"limiter": self._limiter.run(), "left": self._limiter.watch_left(), "batches": self._batches.run()}
        self._tasks = [asyncio.create_task(task, name=name) for name, task in work.items()]
        self._serving = asyncio.create_task(self._server.run_until_stopped(), name="server")
        self._tasks.append(self._serving)
        await self._unless_failed(self._server.listening.wait())

    async def serve(self) -> None:
        """Serve until cancelled."""
        await self._unless_failed(asyncio.Event().wait())

    async def drain(self) -> None:
        """Refuse new requests, and leave batches to others; return once every open answer has been written."""
        self._admission.draining = True
        await self._batches.drain()
        await self._unless_failed(self._admission.wait_until_idle())

    async def close(self) -> None:
        """End open requests with an error that their clients can read, and delete the stream of deltas."""
        self._admission.draining = True
        await self._batches.drain()
        self._open_requests.fail_all(SHUTTING_DOWN)
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.wait([self._serving], timeout=2 * CLOSE_S)
        try:
            await self._limiter.flush()
        except RedisError as error:
            logger.warning("what tenants have used last is not counted", extra={"error": str(error)})
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._templates.close()
        await self._grammars.close()
        try:
            await self._inbox.delete()
        except RedisError as error:
            logger.warning("could not delete the stream of deltas; it will expire", extra={"error": str(error)})
        for client in self._own_clients:
            await client.aclose()

    def load(self) -> dict[str, float]:
        """Return the open requests and recent rates for the lease's status."""
        return {"requests": len(self._admission), "choices": len(self._open_requests), **self._metrics.load()}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            self._open_requests.tick()
            self._keyring.reload()

    async def _unless_failed(self, waiting: Coroutine[object, object, object]) -> None:
        """Wait for `waiting`, unless one of our tasks fails or ends first.

        Raises:
            RuntimeError: a task ended; or the exception that it failed with.
        """
        waiter = asyncio.create_task(waiting)
        try:
            done, _ = await asyncio.wait([waiter, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {waiter}:
                task.result()
                raise RuntimeError(f"the gateway's task {task.get_name()} ended unexpectedly")
        finally:
            waiter.cancel()
