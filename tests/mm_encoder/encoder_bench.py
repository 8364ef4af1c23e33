"""A client of the service under test, and an engine behind it: what the gateway and the engine would see."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from machine import PATIENCE_S
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis_clients import signed_in
from torch import Tensor

from services.mm_encoder.__main__ import build
from services.mm_encoder.handler import SERVICE
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.service import MmEncoder
from services.mm_encoder.settings import MmEncoderSettings
from shared.bus.blobs import Blobs
from shared.bus.client import MAX_BLOCK_MS
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.ownership import EntryOwnership
from shared.bus.records import Records
from shared.bus.streams import LogReader
from shared.bus.work_stream import Delivery, WorkStream
from shared.errors import Failure
from shared.message_codec import from_entry
from shared.messages import (
    Content,
    Encode,
    Failed,
    Generate,
    Media,
    Message,
    Output,
    Request,
    Sampling,
    TokenRun,
    Tokens,
    pack_ids,
)
from shared.model.config import load_model_config
from shared.service import Life

GATEWAY = "gw"
LIMITS = ProcessorSettings(image_max_pixels=784 * 30, video_min_pixels=3136, video_max_pixels=784 * 9)


class Bench:
    """A client of the service under test: what the gateway and the engine would see."""

    def __init__(self, redis: Redis, keys: Keys, directory: Path) -> None:
        self.redis = redis
        self.keys = keys
        self.directory = directory
        self.records = Records(redis, keys)
        self.blobs = Blobs(redis, keys, 600, 1 << 30)
        self.registry = CollectorRegistry()
        self.patch_id = load_model_config(directory).image_patch_id
        self._deltas = LogReader(redis, {keys.deltas(GATEWAY): "0"})
        self._inbox: list[Message] = []

    def settings(self, **changes: object) -> MmEncoderSettings:
        told = {"redis_url": "unused", "model": str(self.directory), "namespace": self.keys.ns, "name": "mm-1"}
        told |= {"step_timeout_s": 0.0}  # a watchdog would end the tests' own process
        told |= {"lease_ms": 300, "mm_processor_kwargs": LIMITS, "max_model_len": 2000}
        return MmEncoderSettings(**told | changes)  # type: ignore[arg-type]

    @asynccontextmanager
    async def running(self, **changes: object) -> AsyncIterator[MmEncoder]:
        """The service through all phases of its life."""
        settings = self.settings(**changes)
        async with signed_in(self.redis, SERVICE) as own:
            service = build(settings, own, self.registry)
            life = Life(SERVICE, service, settings, own)
            task = asyncio.create_task(life.run())
            try:
                yield service
            finally:
                life.stop.set()
                status = await task
        assert status == 0
        assert service.load()["running"] == 0

    async def submit(
        self,
        request_id: str,
        media: Sequence[Media | bytes],
        max_tokens: int | None = None,
        text: int = 3,
        deadline: float | None = None,
    ) -> Encode:
        """One more segment of `text` tokens than media; bytes are uploaded as images, as gateways do."""
        items = []
        for i, item in enumerate(media):
            if isinstance(item, bytes):
                await self.blobs.put("media", f"{request_id}-{i}", item)
                content = Content(hashlib.sha256(item).digest(), len(item))
                item = Media("image", f"messages[0].content[{i}]", blob=f"{request_id}-{i}", content=content)
            items.append(item)
        sampling = Sampling(seed=1, max_tokens=max_tokens)
        request = Request(request_id, GATEWAY, 0, 0.0, sampling, Output(thinking=False), deadline)
        segments = tuple(pack_ids(range(10 * i, 10 * i + text)) for i in range(len(items) + 1))
        message = Encode(request, segments, tuple(items))
        await self.records.submit(ENCODE, message)
        return message

    async def told(self) -> Message:
        """The next message to the gateway."""
        async with asyncio.timeout(PATIENCE_S):
            while not self._inbox:
                self._inbox += [message for _, _, message in await self._deltas.read(100, 1000)]
        return self._inbox.pop(0)

    async def refused(self) -> Failure:
        message = await self.told()
        assert isinstance(message, Failed), message
        return message.failure

    async def went_ahead(self, count: int = 1) -> list[Generate]:
        """What was handed on, once it is `count` entries; embeddings may be missing."""
        async with asyncio.timeout(PATIENCE_S):
            while len(entries := await self.redis.xrange(self.keys.stream(GENERATE))) < count:  # noqa: ASYNC110 - the event is in Redis
                await asyncio.sleep(0.01)
        messages = [from_entry(fields) for _, fields in entries]
        assert all(isinstance(message, Generate) for message in messages)
        return messages  # type: ignore[return-value]

    async def generates(self, count: int = 1) -> list[Generate]:
        """What was handed on, once it is `count` entries and their embeddings are stored."""
        messages = await self.went_ahead(count)
        async with asyncio.timeout(PATIENCE_S):
            for message in messages:
                while await self.ahead(message.request.id):  # noqa: ASYNC110 - the event is in Redis
                    await asyncio.sleep(0.01)
        return messages

    async def ahead(self, request_id: str) -> bool:
        """Whether the request's prompt is ahead of its embeddings."""
        entry_id = await self.redis.hget(self.keys.request(request_id), "ahead")
        return bool(entry_id and await self.redis.xrange(self.keys.stream(ENCODE), entry_id, entry_id))

    async def embeddings(self, key: str) -> tuple[Tensor, dict[str, object]]:
        blob = await self.blobs.get("embeds", key)
        assert blob is not None
        meta = json.loads(blob[1])
        assert meta["dtype"] == "float32"
        return torch.frombuffer(bytearray(blob[0]), dtype=torch.float32).view(meta["rows"], meta["hidden"]), meta

    async def settled(self) -> None:
        """Wait until no entry is waiting or in hand."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.redis.xlen(self.keys.stream(ENCODE)):  # noqa: ASYNC110 - the event is in Redis
                await asyncio.sleep(0.01)

    async def left(self) -> set[str]:
        """Keys that hold something of a request."""
        names = {name.decode().removeprefix(f"{self.keys.ns}:") for name in await self.redis.keys()}
        return {name for name in names if name.startswith(("request:", "journal:", "blob:media"))}

    def waits(self, request_id: str, uploads: int = 1) -> set[str]:
        """What `left` is of a request that waits for the engine: uploads stay, should they be needed again."""
        blobs = [f"blob:media:{request_id}-{i}" for i in range(uploads)]
        return {f"request:{request_id}", *blobs, *(f"{blob}:0" for blob in blobs)}

    def passes(self) -> float:
        """How often the tower has run."""
        return self.registry.get_sample_value("millrace_mm_stage_seconds_count", {"stage": "tower"}) or 0

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0


class EngineStandIn:
    """What sends requests back."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.work = WorkStream(bench.redis, bench.keys, GENERATE, "engine", "e", 9)
        self.ownership = EntryOwnership(bench.redis, bench.keys, GENERATE, "engine", "e")

    async def take(self) -> tuple[str, Generate]:
        """Take a prompt, which may be ahead of its embeddings."""
        await self.work.join()
        taken: list[Delivery] = []
        async with asyncio.timeout(PATIENCE_S):
            while not taken:  # one read waits for less long than an encoder may take
                taken = await self.work.read_new(1, MAX_BLOCK_MS)
        [delivery] = taken
        assert isinstance(delivery.message, Generate)
        request_id = delivery.message.request.id
        assert await self.ownership.raise_epochs([(delivery.entry_id, request_id)])
        return delivery.entry_id, delivery.message

    async def last_words(self) -> list[TokenRun]:
        entries = await self.bench.redis.xrange(self.bench.keys.tokens(0))
        messages = [from_entry(fields) for _, fields in entries]
        return [run for message in messages if isinstance(message, Tokens) for run in message.runs]


async def taken_by_a_dead_replica(bench: Bench, times: int = 1) -> None:
    """As a replica leaves it that dies with an entry in hand: pending under its name, and no lease."""
    for number in range(times):
        stream = WorkStream(bench.redis, bench.keys, ENCODE, "mm_encoder", f"dead-{number}", 100)
        await stream.join()
        taken = await stream.read_new(10, 0) if number == 0 else (await stream.claim_abandoned(10)).claimed
        assert len(taken) == 1
