"""A running gateway, and a stand-in for the stages behind it that tests control."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from machine import PATIENCE_S
from openai import AsyncOpenAI
from prometheus_client import CollectorRegistry, generate_latest
from redis.asyncio import Redis

from cli.redis_users import sign_in
from services.gateway.__main__ import compose
from services.gateway.http.listener import bind
from services.gateway.service import Gateway
from services.gateway.settings import GatewaySettings
from shared.bus.client import connect
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import Fence
from shared.bus.records import Records
from shared.bus.streams import LogReader, send
from shared.messages import (
    Accepted,
    Attach,
    Cancel,
    Delta,
    Deltas,
    Encode,
    Failed,
    Finish,
    Generate,
    Request,
    Usage,
)
from shared.tracing import OFF, Tracing

SHARDS = 4
USAGE = Usage(
    prompt_tokens=11, completion_tokens=3, reasoning_tokens=1, cached_tokens=4, image_tokens=0, video_tokens=0
)


class Running(msgspec.Struct):
    """One gateway process, in this event loop."""

    gateway: Gateway
    url: str
    registry: CollectorRegistry
    client: AsyncOpenAI
    ahead_s: float = 0.0  # how far the clock by which it looks at deadlines runs ahead

    def idle(self) -> bool:
        """Return True if no request is open."""
        load = self.gateway.load()
        return not load["requests"] and not load["choices"]

    def metric(self, line: str) -> float:
        """The value of a metric by its name and labels as written in the exposition format."""
        for shown in generate_latest(self.registry).decode().splitlines():
            if shown.startswith(f"{line} "):
                return float(shown.rpartition(" ")[2])
        raise AssertionError(f"no metric {line}")


@asynccontextmanager
async def running(checkpoint: Path, redis_url: str, tracing: Tracing = OFF, **settings: Any) -> AsyncIterator[Running]:
    """Start a gateway on a free loopback port; stop it as the service's life does."""
    fields = {
        "redis_url": redis_url,
        "model": str(checkpoint),
        "namespace": "test",
        "name": "gw",
        "max_model_len": 2048,
        "watch_s": PATIENCE_S,  # nobody who stands still for a while is asked for anything
    }
    told = GatewaySettings(**{**fields, "host": "127.0.0.1", "shards": SHARDS, **settings})
    redis = connect(sign_in(redis_url, "gateway"))
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    registry = CollectorRegistry()
    gateway = compose(told, redis, listener, registry, tick_s=0.02, tracing=tracing)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="key-1", max_retries=0, timeout=PATIENCE_S)
    made = Running(gateway, url, registry, client)
    gateway._open_requests._clock = lambda: time.time() + made.ahead_s
    await gateway.startup()
    try:
        yield made
    finally:
        await client.close()
        await gateway.close()
        await redis.aclose()


async def until(true: Callable[[], bool]) -> None:
    """Let the event loop run until a condition is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110  (the gateway sets no event for it)
            await asyncio.sleep(0.001)


class Stages:
    """Stand-in for the stages: reads the gateway's messages and writes their answers."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis = redis
        self.keys = keys
        self._work = LogReader(redis, {keys.stream(GENERATE): "0", keys.stream(ENCODE): "0"})
        self._control = LogReader(redis, {keys.control(): "0"})
        self._tokens = LogReader(redis, {keys.tokens(shard): "0" for shard in range(SHARDS)})
        self._taken: list[Encode | Generate] = []
        self._attached: list[Attach] = []
        self._said: dict[str, int] = {}  # request -> seq of the newest delta

    async def take(self, count: int = 1) -> list[Encode | Generate]:
        """The next `count` work entries, in the order in which they were sent."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self._taken) < count:
                for _, _, message in await self._work.read(1000, 100):
                    assert isinstance(message, Encode | Generate)
                    self._taken.append(message)
        taken, self._taken = self._taken[:count], self._taken[count:]
        return taken

    async def request(self) -> Request:
        """The next request."""
        return (await self.take())[0].request

    async def cancelled(self) -> set[str]:
        """The ids of the next Cancel."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for _, _, message in await self._control.read(1, 100):
                    assert isinstance(message, Cancel)
                    return set(message.request_ids)

    async def attached(self) -> Attach:
        """The next Attach."""
        async with asyncio.timeout(PATIENCE_S):
            while not self._attached:
                for _, _, message in await self._tokens.read(100, 100):
                    assert isinstance(message, Attach)
                    self._attached.append(message)
        return self._attached.pop(0)

    async def say(self, request: Request, *deltas: Delta) -> None:
        """Send deltas in one message, as postproc does, each starting where the one before it ended."""
        await self.send(request.gateway, *map(self._started, deltas))

    async def send(self, gateway: str, *deltas: Delta) -> None:
        """Send deltas as they are."""
        await send(self.redis, self.keys.deltas(gateway), Deltas(deltas))

    async def keep(self, *requests: Request) -> None:
        """Keep finished answers, as postproc does."""
        ended = [(request.id, Finish("stop"), 60.0) for request in requests]
        await Records(self.redis, self.keys).retain(ended, Fence(self.keys, "", {}))

    def _started(self, delta: Delta) -> Delta:
        before = self._said.get(delta.request_id, 0)
        self._said[delta.request_id] = max(before, delta.seq)
        return msgspec.structs.replace(delta, start=before if delta.seq > before else delta.seq - 1)

    async def tell(self, request: Request, message: Accepted | Failed) -> None:
        """Send a message of the mm_encoder."""
        await send(self.redis, self.keys.deltas(request.gateway), message)

    async def answer(self, request: Request, *texts: str, usage: Usage = USAGE) -> None:
        """A whole answer, one message a text."""
        for i, text in enumerate(texts):
            await self.say(request, Delta(request.id, i + 1, content=text))
        await self.say(request, Delta(request.id, len(texts) + 1, finish_reason="stop", usage=usage))
