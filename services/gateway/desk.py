"""The open requests, in one dict: entered when submitted, removed by one method whatever ends them."""

import asyncio
import secrets
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
from redis.exceptions import RedisError

from services.gateway.errors import TIMED_OUT
from services.gateway.exchange import Choice, Exchange
from services.gateway.media import Item
from services.gateway.metrics import GatewayMetrics
from services.gateway.order import Order
from services.gateway.sampling import choice_seed
from shared import keys, log
from shared.blobs import Blobs
from shared.errors import Failure
from shared.messages import Accepted, Delta, Deltas, Encode, Failed, Generate, Media, Message, Request, pack_ids
from shared.records import Records

logger = log.logger(__name__)


class Clock(Protocol):
    """Unix seconds."""

    def __call__(self) -> float: ...


class DeskRules(msgspec.Struct, frozen=True):
    """How requests are sent and how long they may take."""

    gateway: str  # this process's name: where deltas come to
    shards: int
    timeout_s: float
    keep_alive_s: float
    max_pending: int  # bytes


class Desk:
    """Sends orders into the pipeline and gives what comes back to whoever waits for it."""

    def __init__(self, rules: DeskRules, records: Records, blobs: Blobs, metrics: GatewayMetrics, clock: Clock) -> None:
        self._rules = rules
        self._records = records
        self._blobs = blobs
        self._metrics = metrics
        self._clock = clock
        self._open: dict[str, Choice] = {}

    def __len__(self) -> int:
        """Choices that are open."""
        return len(self._open)

    @asynccontextmanager
    async def open(self, order: Order, created: float, trace: str | None) -> AsyncIterator[Exchange]:
        """Send `order`; what has not ended when the block is left is cancelled.

        Raises:
            RedisError: it could not be sent; nothing of it is left behind that Redis does not expire.
        """
        deadline = created + self._rules.timeout_s
        exchange = Exchange(secrets.token_hex(8), order, created, deadline, self._rules.max_pending)
        self._open.update({choice.request_id: choice for choice in exchange.choices})
        gauge = self._metrics.open.labels("true" if order.stream else "false")
        gauge.inc()
        try:
            for choice in exchange.choices:
                await self._submit(choice, trace)
            yield exchange
        finally:
            gauge.dec()
            await self._close(exchange)

    def route(self, message: Message) -> None:
        """Give a message of our stream to the request it is for. One that nobody waits for any more is dropped."""
        match message:
            case Deltas(items):
                now = self._clock()
                for delta in items:
                    self._deliver(delta, now)
            case Accepted(request_id):
                if (choice := self._open.get(request_id)) is not None:
                    choice.exchange.accept(choice)
            case Failed(request_id, failure):
                if (choice := self._open.get(request_id)) is not None:
                    choice.exchange.fail(choice, failure)
            case _:
                logger.warning("unexpected message", extra={"type": type(message).__name__})

    def tick(self) -> None:
        """Once in a while: end what is past its deadline, wake what has been silent for long."""
        now = self._clock()
        for exchange in {choice.exchange for choice in self._open.values()}:
            if now >= exchange.deadline:
                exchange.fail(None, TIMED_OUT)
            elif now - exchange.idle_since >= self._rules.keep_alive_s:
                exchange.idle_since = now
                exchange.poke()

    def fail_all(self, failure: Failure) -> None:
        """End every open request with the same answer."""
        for choice in self._open.values():
            choice.exchange.fail(None, failure)

    def _deliver(self, delta: Delta, now: float) -> None:
        choice = self._open.get(delta.request_id)
        if choice is None:
            return
        exchange = choice.exchange
        exchange.idle_since = now
        if not exchange.started and delta.failure is None:
            exchange.started = True
            self._metrics.first_token.observe(now - exchange.created)
        exchange.feed(choice, delta)

    async def _submit(self, choice: Choice, trace: str | None) -> None:
        """Media first: an entry whose blobs are missing would fail."""
        exchange = choice.exchange
        order = exchange.order
        request = Request(
            id=choice.request_id,
            gateway=self._rules.gateway,
            shard=zlib.crc32(choice.request_id.encode()) % self._rules.shards,
            created=exchange.created,
            sampling=msgspec.structs.replace(order.sampling, seed=choice_seed(order.sampling.seed, choice.index)),
            output=order.output,
            deadline=exchange.deadline,
            trace=trace,
        )
        uploads = {_blob_key(choice, i): item.data for i, item in enumerate(order.media) if item.data is not None}
        segments = tuple(map(pack_ids, order.segments))
        try:
            for key, data in uploads.items():
                await self._blobs.put("media", key, data)
            if order.media:
                media = tuple(_media(item, _blob_key(choice, i)) for i, item in enumerate(order.media))
                await self._records.submit(keys.ENCODE, Encode(request, segments, media))
            else:
                await self._records.submit(keys.GENERATE, Generate(request, segments[0], order.max_tokens))
        except BaseException:
            await self._discard(choice, list(uploads))
            raise
        choice.submitted = True

    async def _discard(self, choice: Choice, uploads: list[str]) -> None:
        """Remove what a request that could not be sent may have left: its entry, if there is one after all, is dropped
        by whoever takes it and finds no record. Where Redis does not answer, blobs expire."""
        try:
            await self._records.delete([choice.request_id])
            if uploads:
                await self._blobs.delete("media", uploads)
        except RedisError as error:
            logger.warning("could not clean up", extra={"request_id": choice.request_id, "error": str(error)})

    async def _close(self, exchange: Exchange) -> None:
        """The one way out of the dict: after the finish, a failure, a disconnect, a deadline."""
        for choice in exchange.choices:
            del self._open[choice.request_id]
        self._account(exchange)
        left = [choice.request_id for choice in exchange.choices if choice.submitted and not choice.ended]
        if not left:
            return
        self._metrics.cancelled.inc(len(left))
        try:
            # Shielded: whoever cancels the connection's task must not keep the engine working for nobody.
            await asyncio.shield(self._records.cancel(left))
        except RedisError as error:
            logger.warning("could not cancel", extra={"request_id": exchange.id, "error": str(error)})

    def _account(self, exchange: Exchange) -> None:
        usages = [choice.usage for choice in exchange.choices if choice.usage is not None]
        if len(usages) == len(exchange.choices):
            self._metrics.latency.observe(self._clock() - exchange.created)
            self._metrics.prompt_tokens.inc(usages[0].prompt_tokens)
            self._metrics.generation_tokens.inc(sum(usage.completion_tokens for usage in usages))


def _blob_key(choice: Choice, index: int) -> str:
    return f"{choice.request_id}-{index}"


def _media(item: Item, key: str) -> Media:
    blob = None if item.data is None else key
    return Media(kind=item.kind, param=item.param, url=item.url, blob=blob, video=item.video)
