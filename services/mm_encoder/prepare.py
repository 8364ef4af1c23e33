"""Preparation of a request's media: bytes, then sizes, then pixels. All checks that can answer 4xx are made here."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from httpcore import AsyncConnectionPool

from services.mm_encoder.decoding.decoders import SMALL_BYTES, Decoders
from services.mm_encoder.decoding.small_images import ROOM_BYTES, is_small
from services.mm_encoder.media.fetch import Fetched, Fetcher, Unchanged
from services.mm_encoder.media.patches import Patches
from services.mm_encoder.media.processor import ImagePlan, Processor, VideoPlan
from services.mm_encoder.media.refusal import named, over_limit
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.prompt import Embedded, text_tokens
from services.mm_encoder.received import HeldBytes, Received
from services.mm_encoder.store.cache import Embeds, SingleFlight, content_digest, content_key
from shared.bus.blobs import MEDIA, Blobs
from shared.errors import RequestError, internal
from shared.limits import resolve_max_tokens
from shared.messages import Encode, Media

T = TypeVar("T")

DECODED_AT_ONCE = 4  # of one request: decoders are first come first served, and others' files should not wait for all


@dataclass(frozen=True, slots=True)
class Source:
    """One image or video whose bytes have been read; `plan` is how to process them unless embeddings are stored."""

    media: Media
    key: str
    found: Embedded | None
    plan: ImagePlan | VideoPlan | None  # None if `found`
    data: bytes = field(repr=False)  # empty if `found` or decoded
    patches: Patches | None = field(default=None, repr=False)  # of a small image, decoded with its plan


Links = dict[int, Fetched | Source]  # what was fetched, by the index of its item


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image or video of a request that has passed all checks."""

    embedded: Embedded
    patches: Patches | None  # None: its embeddings are stored already


class Preparer:
    """Preprocessor: everything before the vision tower."""

    def __init__(
        self,
        *,
        processor: Processor,
        decoders: Decoders,
        fetcher: Fetcher,
        blobs: Blobs,
        embeds: Embeds,
        identity: bytes,
        metrics: Metrics,
        max_bytes: int,
        max_request_bytes: int,
        max_held_bytes: int,
        max_model_len: int,
    ) -> None:
        """`max_held_bytes`: the bytes of media here, of all requests, beyond which no more of a link is taken."""
        self._processor = processor
        self._decoders = decoders
        self._starting: asyncio.Task[None] | None = None
        self._fetcher = fetcher
        self._blobs = blobs
        self._embeds = embeds
        self._identity = identity
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._max_request_bytes = max_request_bytes
        self._held = HeldBytes(max_held_bytes)
        self._max_model_len = max_model_len
        self._decoding: SingleFlight[Patches] = SingleFlight()
        self._reading: SingleFlight[tuple[ImagePlan | VideoPlan, Patches | None]] = SingleFlight()

    def start(self) -> None:
        """Start a decoder beside whatever else starts."""
        self._starting = asyncio.create_task(self._decoders.start())

    def receive(self, message: Encode) -> Received:
        """Return the counter of a request's bytes, within which to `fetch` and then `prepare` its media."""
        room = len(message.media) * self._processor.tokens_of(ROOM_BYTES)
        fits = text_tokens(message.segments) + room < self._max_model_len
        return Received(self._max_request_bytes, self._held, fits)

    async def fetch(self, media: Sequence[Media], received: Received) -> Links:
        """Fetch those of the media that have URLs; the first that fails ends the others.

        Raises:
            RequestError: one could not be fetched; the message names its field.
        """
        try:
            async with self._fetcher.connections() as connections, asyncio.TaskGroup() as group:
                tasks = {
                    index: group.create_task(self._fetch_link(item, item.url, connections, received))
                    for index, item in enumerate(media)
                    if item.url is not None
                }
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return {index: task.result() for index, task in tasks.items()}

    async def prepare(
        self,
        message: Encode,
        received: Received,
        links: Links,
        ready: Callable[[int, Prepared], None] = lambda index, item: None,
    ) -> tuple[list[Prepared], int]:
        """Return the media in order, and the most tokens to generate; `links`, which were fetched, are used up.

        Pixels are decoded only if the prompt fits. Where small images fit however many tokens they have, they are
        decoded at once.

        `ready` is called with each of the media, and its index, as soon as it has passed its checks. Others may still
        be refused.

        Raises:
            RequestError: 4xx, one of the media is refused; the message names its field. Of several, the first.
        """
        steps = [self._source(media, links.pop(index, None), received) for index, media in enumerate(message.media)]
        sources = await gather_in_order(steps)
        tokens = text_tokens(message.segments) + sum(_rows(source) for source in sources)
        max_tokens = resolve_max_tokens(tokens, message.request.sampling.max_tokens, self._max_model_len)

        some = asyncio.Semaphore(DECODED_AT_ONCE)

        async def decode(index: int, source: Source) -> Prepared:
            async with some:
                item = await self._decode(source)
            received.give_back(len(source.data))
            ready(index, item)
            return item

        decoding = [decode(index, source) for index, source in enumerate(sources)]
        del steps, sources  # and with each source its bytes once it is decoded
        return await gather_in_order(decoding), max_tokens

    async def prepare_one(self, media: Media, key: str) -> Prepared | None:
        """Return one of the media of a request that another replica has; None if its key is not `key` any more.

        Raises:
            RequestError: it cannot be had or decoded.
        """
        with Received(self._max_request_bytes, self._held, True) as received:
            links = await self.fetch([media], received)
            source = await self._source(media, links.pop(0, None), received)
            return await self._decode(source) if source.key == key else None

    async def close(self) -> None:
        await self._reading.close()
        await self._decoding.close()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._decoders.close()

    async def _source(self, media: Media, link: Fetched | Source | None, received: Received) -> Source:
        with _naming(media):
            if isinstance(link, Source):
                return link
            if link is None:
                return await self._from_upload(media, received)
            digest = await _digest(link.data)
            self._fetcher.remember(link, digest)
            return await self._look_up(media, link.data, digest, received)  # which were counted as they came

    async def _from_upload(self, media: Media, received: Received) -> Source:
        """Return the source of an upload. If its gateway has named the digest, embeddings are looked for first."""
        if media.content is None:
            data = await self._upload(media, received)
            received.count(len(data))
            return await self._look_up(media, data, await _digest(data), received)
        self._check_size(media.content.size)
        received.count(media.content.size)
        key = content_key(media.content.digest, self._processor.signature(media), self._identity)
        if (found := await self._embeds.find(media.kind, key)) is not None:
            return Source(media, key, found, None, b"")
        return await self._read(media, key, await self._upload(media, received), received)

    async def _fetch_link(
        self, media: Media, url: str, connections: AsyncConnectionPool, received: Received
    ) -> Fetched | Source:
        """Return what is at a URL; its source if its server says that it has not changed and embeddings are stored."""
        with _naming(media):
            fetched = await self._fetch(url, connections, received)
            if isinstance(fetched, Unchanged):
                key = content_key(fetched.digest, self._processor.signature(media), self._identity)
                if (found := await self._embeds.find(media.kind, key)) is not None:
                    received.count(fetched.size)
                    return Source(media, key, found, None, b"")
                fetched = await self._fetch(url, connections, received, anew=True)
                assert isinstance(fetched, Fetched), "nothing is known of what is wanted anew"
            return fetched

    async def _look_up(self, media: Media, data: bytes, digest: bytes, received: Received) -> Source:
        """Return a source by its bytes: its embeddings if they are stored, else how to process it."""
        key = content_key(digest, self._processor.signature(media), self._identity)
        if (found := await self._embeds.find(media.kind, key)) is not None:
            received.give_back(len(data))
            return Source(media, key, found, None, b"")
        return await self._read(media, key, data, received)

    async def _read(self, media: Media, key: str, data: bytes, received: Received) -> Source:
        """Return how to process a source without embeddings; a small image is decoded as well, if it surely fits."""
        if not (received.fits and is_small(media, data)):
            with self._metrics.stage("plan"):
                return Source(media, key, None, await self._decoders.plan(media, data), data)
        async with received.small:
            plan, patches = await self._reading.join(key, partial(self._read_small, media, data))
        if patches is None:
            return Source(media, key, None, plan, data)
        received.give_back(len(data))
        return Source(media, key, None, plan, b"", patches)

    async def _read_small(self, media: Media, data: bytes) -> tuple[ImagePlan | VideoPlan, Patches | None]:
        with self._metrics.stage("decode"):
            return await self._decoders.read_small(media, data)

    async def _fetch(
        self, url: str, connections: AsyncConnectionPool, received: Received, *, anew: bool = False
    ) -> Fetched | Unchanged:
        async with received.fetches:
            with self._metrics.stage("fetch"):
                fetched = await self._fetcher.fetch(url, connections, anew=anew, count=received.arrive)
        self._metrics.count_fetched(len(fetched.data) if isinstance(fetched, Fetched) else 0)
        return fetched

    async def _upload(self, media: Media, received: Received) -> bytes:
        assert media.blob is not None, "media has a URL or a blob"
        blob = await self._blobs.get(MEDIA, media.blob)
        if blob is None or (media.content is not None and len(blob[0]) != media.content.size):
            raise internal("The uploaded media is no longer in the store.", "media_lost", 503)
        self._check_size(len(blob[0]))
        received.hold(len(blob[0]))
        return blob[0]

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise over_limit("The media's size in bytes", "media_max_bytes", self._max_bytes)

    async def _decode(self, source: Source) -> Prepared:
        if source.plan is None:
            assert source.found is not None, "a source is found or planned"
            return Prepared(source.found, None)
        patches = source.patches
        if patches is None:
            with _naming(source.media):
                patches = await self._decoding.join(source.key, partial(self._patches, source.plan, source.data))
        return Prepared(Embedded(source.media.kind, source.key, patches.grid, source.plan.tokens), patches)

    async def _patches(self, plan: ImagePlan | VideoPlan, data: bytes) -> Patches:
        with self._metrics.stage("decode"):
            return await self._decoders.patches(plan, data)


@contextmanager
def _naming(media: Media) -> Iterator[None]:
    """
    Raises:
        RequestError: one was raised within; its message names the field of `media`.
    """
    try:
        yield
    except RequestError as error:
        raise named(error, media.param) from error


async def _digest(data: bytes) -> bytes:
    """Return the digest of a source's bytes, in a thread if there are many."""
    return content_digest(data) if len(data) <= SMALL_BYTES else await asyncio.to_thread(content_digest, data)


def _rows(source: Source) -> int:
    if source.plan is not None:
        return source.plan.tokens
    assert source.found is not None, "a source is found or planned"
    return source.found.rows


async def gather_in_order(steps: Sequence[Awaitable[T]]) -> list[T]:
    """Run all awaitables to their end, concurrently; raise the first error by position, not by time."""
    results = await asyncio.gather(*steps, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
