"""The gateway's life: its tasks run from startup to close, since answers still come in while it drains."""

import asyncio
from collections.abc import Coroutine, Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.gateway.errors import SHUTTING_DOWN
from services.gateway.http.admission import Admission
from services.gateway.http.server import CLOSE_S, Server
from services.gateway.inflight.inbox import Inbox
from services.gateway.inflight.registry import OpenRequests
from services.gateway.metrics import GatewayMetrics
from shared import log

SERVICE = "gateway"

logger = log.logger(__name__)


class Gateway:
    """The service that `shared.service` runs."""

    name = SERVICE

    def __init__(
        self,
        *,
        own_clients: Sequence[Redis],
        admission: Admission,
        open_requests: OpenRequests,
        inbox: Inbox,
        server: Server,
        metrics: GatewayMetrics,
        tick_s: float,
        watch_s: float,
    ) -> None:
        """`own_clients` are closed with us; `tick_s`: how often deadlines and silent streams are looked after;
        `watch_s`: how often Redis is asked whether it still has what we wait for."""
        self._own_clients = own_clients
        self._admission = admission
        self._open_requests = open_requests
        self._inbox = inbox
        self._server = server
        self._metrics = metrics
        self._tick_s = tick_s
        self._watch_s = watch_s
        self._serving: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self) -> None:
        """Listen to answers, then to clients."""
        await self._inbox.create()
        work = {"inbox": self._inbox.run(), "watch": self._inbox.watch(self._watch_s), "clock": self._tick()}
        self._tasks = [asyncio.create_task(task, name=name) for name, task in work.items()]
        self._serving = asyncio.create_task(self._server.run_until_stopped(), name="server")
        self._tasks.append(self._serving)
        await self._while_well(self._server.listening.wait())

    async def serve(self) -> None:
        await self._while_well(asyncio.Event().wait())

    async def drain(self) -> None:
        """Refuse new work; return when every open answer has been written."""
        self._admission.draining = True
        await self._while_well(self._admission.empty())

    async def close(self) -> None:
        """End what is still open with an error that its client can read, and leave nothing in Redis."""
        self._admission.draining = True
        self._open_requests.fail_all(SHUTTING_DOWN)
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.wait([self._serving], timeout=2 * CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._inbox.delete()
        except RedisError as error:
            logger.warning("the stream of answers is left to expire", extra={"error": str(error)})
        for client in self._own_clients:
            await client.aclose()

    def load(self) -> dict[str, float]:
        return {"requests": self._admission.inside, "choices": len(self._open_requests), **self._metrics.figures()}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            self._open_requests.tick()

    async def _while_well(self, waiting: Coroutine[object, object, object]) -> None:
        """Wait for `waiting`, or fail with whichever task of ours fails before."""
        waiter = asyncio.create_task(waiting)
        try:
            done, _ = await asyncio.wait([waiter, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {waiter}:
                task.result()
                raise RuntimeError(f"{task.get_name()} of the gateway ended by itself")
        finally:
            waiter.cancel()
