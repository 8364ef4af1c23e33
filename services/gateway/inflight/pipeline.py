"""What the gateway sends to the other stages and reads of requests that are under way."""

import asyncio
import math
import zlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.gateway.errors import QUEUE_DOWN, REUSED_KEY, unknown_request
from services.gateway.inflight.backlog import Backlog
from services.gateway.inflight.headers import Key
from services.gateway.inflight.request import Choice, OpenRequest, choice_id
from services.gateway.request import answer_format as forms
from services.gateway.request.answer_format import Form
from services.gateway.request.media import Item
from services.gateway.request.parsed import ParsedRequest
from services.gateway.request.sampling import choice_seed
from shared import log
from shared.bus import keys
from shared.bus.blobs import MEDIA, Blobs, upload_keys
from shared.bus.keys import Keys
from shared.bus.records import Record, Records, Submission
from shared.bus.streams import send
from shared.crash_points import crash_point
from shared.errors import RequestError
from shared.messages import Attach, Encode, Generate, Media, Request, pack_ids

CLEAN_UP_S = 2.0  # after that, what is left behind is left to expire

logger = log.logger(__name__)


class Route(msgspec.Struct, frozen=True):
    """How requests are sent."""

    gateway: str  # this process's name: where deltas come to
    shards: int
    retain_s: float  # how long an answer can be read again after its end
    submit_s: float  # for Redis to take a request in, or to say what it knows of one


class Ticket(msgspec.Struct, frozen=True):
    """What a request came with besides its body."""

    created: float  # unix seconds
    deadline: float
    owner: str
    key: Key | None
    trace: str | None


class Known(msgspec.Struct, frozen=True):
    """A request that runs or is kept."""

    id: str
    form: Form
    records: tuple[Record, ...]  # by choice

    @property
    def created(self) -> float:
        return self.records[0].request.created

    @property
    def deadline(self) -> float:
        return self.records[0].request.deadline or math.inf

    @property
    def ended(self) -> bool:
        return all(record.finish is not None for record in self.records)


class Pipeline:
    """The stages behind Redis, as the desk sees them."""

    def __init__(self, route: Route, redis: Redis, keys: Keys, backlog: Backlog, blobs: Blobs) -> None:
        self._route = route
        self._redis = redis
        self._keys = keys
        self._backlog = backlog
        self._blobs = blobs
        self._records = Records(redis, keys)

    async def submit(self, open_request: OpenRequest, order: ParsedRequest, ticket: Ticket) -> str | None:
        """Send every choice of `exchange`, or none: then, under the same key, a request was sent before, whose id is
        returned.

        Raises:
            RequestError: 409, the key was used for something else; 429, the queue is full; 503, Redis does not answer.
            RedisError: it could not be sent; nothing of it is left behind that Redis does not expire.
        """
        async with self._in_time():
            await self._backlog.admit(order.n)
            earlier = await self._send(self._works(open_request, order, ticket), _uploads(open_request, order), ticket)
        if earlier is not None:
            assert ticket.key is not None
            if earlier.body_hash != ticket.key.body:
                raise RequestError(REUSED_KEY)
            return earlier.request_ids[0]
        for choice in open_request.choices:
            choice.submitted = True
        return None

    async def find(self, request_id: str, owner: str) -> Known:
        """
        Raises:
            RequestError: 404, unknown or no longer known, or another's; 503, Redis does not answer.
            RedisError: it cannot be known.
        """
        async with self._in_time():
            first = (await self._records.get([request_id])).get(request_id)
            if first is None:
                raise unknown_request(request_id)
            form = forms.decode(first.request.form)
            ids = [choice_id(request_id, index) for index in range(form.n)]
            records = {request_id: first, **(await self._records.get(ids[1:]))}
        if form.owner != owner or len(records) < form.n:
            raise unknown_request(request_id)
        return Known(request_id, form, tuple(records[each] for each in ids))

    async def records(self, request_ids: Iterable[str]) -> dict[str, Record]:
        """Those that exist."""
        return await self._records.get(list(request_ids))

    def is_ours(self, record: Record) -> bool:
        """Whether its answer comes to this gateway."""
        return self._route.gateway in record.gateways

    async def attach(self, choices: Sequence[Choice]) -> None:
        """Have the answers come here too from now on, and first what comes after what each choice has.

        The record says so at once, so that no other gateway that has had the request cancels it.
        """
        if not choices:
            return
        await self._records.attach([choice.request_id for choice in choices], self._route.gateway)
        for choice in choices:
            attach = Attach(choice.request_id, self._route.gateway, choice.seq, choice.until)
            choice.asked = True
            crash_point("gateway.attach.before")
            await send(self._redis, self._keys.tokens(self._shard(choice.request_id)), attach)
            crash_point("gateway.attach.after")

    async def join(self, choices: Sequence[Choice]) -> None:
        """`attach` for a client that waits for it.

        Raises:
            RequestError: 503, Redis does not answer.
            RedisError: they cannot be asked for.
        """
        async with self._in_time():
            await self.attach(choices)

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """Stop work on these, except on what another gateway has readers of."""
        alone = await self._records.detach(request_ids, self._route.gateway)
        if alone:
            crash_point("gateway.cancel.before")
            await self._records.cancel(alone)
            crash_point("gateway.cancel.after")

    # ------------------------------------------------------------------------------------------------ sending

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """A Redis that is silent is as good as none."""
        try:
            async with asyncio.timeout(self._route.submit_s):
                yield
        except TimeoutError:
            raise RequestError(QUEUE_DOWN) from None

    async def _send(
        self, works: list[Encode] | list[Generate], uploads: dict[str, bytes], ticket: Ticket
    ) -> Submission | None:
        """Media first: an entry whose blobs are missing would fail."""
        stream = keys.ENCODE if isinstance(works[0], Encode) else keys.GENERATE
        earlier = None
        try:
            for key, data in uploads.items():
                await self._blobs.put(MEDIA, key, data)
            crash_point("gateway.submit.before")
            if ticket.key is None:
                for work in works:
                    await self._records.submit(stream, work)
            else:
                request = works[0].request
                ttl_s = math.ceil(max(0.0, ticket.deadline - ticket.created) + request.retain_s) + 1
                earlier = await self._records.submit_once(stream, works, ticket.key.digest, ticket.key.body, ttl_s)
            crash_point("gateway.submit.after")
        except BaseException:
            await self._discard([work.request.id for work in works], uploads)
            raise
        if earlier is not None:
            await self._discard([], uploads)
        return earlier

    def _works(self, open_request: OpenRequest, order: ParsedRequest, ticket: Ticket) -> list[Encode] | list[Generate]:
        segments = tuple(map(pack_ids, order.segments))
        requests = [self._request(choice, order, ticket) for choice in open_request.choices]
        if not order.media:
            return [Generate(request, segments[0], order.max_tokens) for request in requests]
        return [
            Encode(request, segments, tuple(_media(item, key) for key, item in _keyed(request.id, order)))
            for request in requests
        ]

    def _request(self, choice: Choice, order: ParsedRequest, ticket: Ticket) -> Request:
        retain_s = self._route.retain_s
        if retain_s and order.n > 1:
            retain_s += ticket.deadline - ticket.created  # a choice that ends early is kept for the others' sake
        return Request(
            id=choice.request_id,
            gateway=self._route.gateway,
            shard=self._shard(choice.request_id),
            created=ticket.created,
            sampling=msgspec.structs.replace(order.sampling, seed=choice_seed(order.sampling.seed, choice.index)),
            output=order.output,
            deadline=ticket.deadline,
            retain_s=retain_s,
            trace=ticket.trace,
            form=forms.encode(choice.open_request.form),
        )

    def _shard(self, request_id: str) -> int:
        return zlib.crc32(request_id.encode()) % self._route.shards

    async def _discard(self, request_ids: list[str], uploads: Iterable[str]) -> None:
        """Remove what a request that could not be sent may have left: its entry, if there is one after all, is dropped
        by whoever takes it and finds no record. Where Redis does not answer, blobs expire."""
        try:
            async with asyncio.timeout(CLEAN_UP_S):
                await self._records.delete(request_ids)
                if uploads:
                    await self._blobs.delete(MEDIA, list(uploads))
        except (RedisError, TimeoutError) as error:
            logger.warning("could not clean up", extra={"request_ids": request_ids, "error": str(error)})


def _uploads(open_request: OpenRequest, order: ParsedRequest) -> dict[str, bytes]:
    return {
        key: item.data
        for choice in open_request.choices
        for key, item in _keyed(choice.request_id, order)
        if item.data is not None
    }


def _keyed(request_id: str, order: ParsedRequest) -> Iterable[tuple[str, Item]]:
    return zip(upload_keys(request_id, len(order.media)), order.media, strict=True)


def _media(item: Item, key: str) -> Media:
    blob = None if item.data is None else key
    return Media(kind=item.kind, param=item.param, url=item.url, blob=blob, video=item.video)
