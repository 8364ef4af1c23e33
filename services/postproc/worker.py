"""The hot loop: read engine steps, fold them, send deltas, and now and then write journals and trim.

The order within a turn makes every crash harmless. Deltas are sent before their tokens are journaled, and tokens are
journaled before the stream is trimmed; so whatever a new owner finds in a journal was sent, and whatever is not in a
journal is still in the stream, from whose beginning it starts.
"""

import asyncio
import math
import time
from collections.abc import Callable

from redis.asyncio import Redis

from services.postproc.detokenize import Vocabulary
from services.postproc.flows import EntryId, Flow, Flows, Turn
from services.postproc.metrics import PostprocMetrics
from services.postproc.settings import PostprocSettings
from shared.bus import command
from shared.errors import ProtocolError
from shared.keys import Keys
from shared.leases import Shards, live
from shared.log import logger
from shared.messages import Delta, Deltas, Tokens
from shared.records import Records
from shared.streams import LogReader, send

SERVICE = "postproc"

_log = logger(__name__)

Step = tuple[int, EntryId, Tokens]  # shard, where it stands, what it says


class Owned:
    """A shard that is ours."""

    __slots__ = ("epoch", "last", "replay_until", "steps", "trimmed_at")

    def __init__(self, epoch: int, newest: EntryId) -> None:
        self.epoch = epoch
        self.replay_until = newest  # up to here a former owner may have sent deltas
        self.last: EntryId = (0, 0)  # the last entry folded
        self.steps = 0  # folded since the last trim
        self.trimmed_at: EntryId = (0, 0)  # `last` at the last trim


class Worker:
    """The service (shared.service.Service). Renew the lease before the first turn."""

    name = SERVICE

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        settings: PostprocSettings,
        vocabulary: Vocabulary,
        metrics: PostprocMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._records = Records(redis, keys)
        self._shards = Shards(redis, keys, SERVICE, settings.name, settings.shards)
        self._reader = LogReader(redis, {})
        self._flows = Flows(vocabulary, settings.parsers(), settings.journal_every)
        self._shard_of = {keys.tokens(shard): shard for shard in range(settings.shards)}
        self._owned: dict[int, Owned] = {}
        self._interval_ms = max(1, settings.lease_ms // 3)
        self._own_at = -math.inf

    # ------------------------------------------------------------------------------------------------ phases

    async def startup(self) -> None:
        """
        Raises:
            ConfigError: the deployment has another number of shards.
        """
        await self._shards.check_count()

    async def serve(self) -> None:
        while True:
            await self.turn()

    async def drain(self) -> None:
        """Hand the shards over. Whoever takes them finds all it needs in the streams and journals."""
        await self._shards.release(list(self._owned))
        for shard in list(self._owned):
            self._disown(shard)

    async def close(self) -> None:
        """Nothing is left to close: the client is closed by whoever made it."""

    def load(self) -> dict[str, float]:
        held = {"open": float(len(self._flows)), "shards": float(len(self._owned))}
        return held | self._metrics.figures()

    # ------------------------------------------------------------------------------------------------ the loop

    async def turn(self) -> None:
        """Wait for engine steps, for a third of the lease at most, and deal with them."""
        await self._keep_shards()
        steps = await self._read()
        # A process that was paused while it waited may have lost its shards, and must not send for them.
        changed = await self._keep_shards()
        steps = [step for step in steps if step[0] in self._owned and step[0] not in changed]
        if not steps:
            return
        await self._open_strangers(steps)
        turn = self._fold(steps)
        await self._send(turn.deltas)
        await self._end(turn)
        await self._save(turn.due)
        await self._trim()
        self._count(turn)

    async def _read(self) -> list[Step]:
        try:
            entries = await self._reader.read(self._settings.read_count, self._interval_ms)
        except ProtocolError:
            # The requests in it have a gap now, which ends each in an error as soon as its next token comes.
            _log.exception("entry of a tokens stream skipped")
            return []
        return [
            (self._shard_of[stream], _parse(entry_id), message)
            for stream, entry_id, message in entries
            if isinstance(message, Tokens)
        ]

    async def _open_strangers(self, steps: list[Step]) -> None:
        strangers = self._flows.strangers([message for _, _, message in steps])
        if not strangers:
            return
        records = await self._records.get(list(strangers))
        self._flows.ignore(strangers - records.keys())
        for request_id, record in records.items():
            journal = await self._records.read_journal(request_id) if record.begin else []
            self._metrics.replayed.inc(len(journal))
            self._flows.open(record.request.shard, record, journal)

    def _fold(self, steps: list[Step]) -> Turn:
        turn = Turn()
        for shard, entry, message in steps:
            owned = self._owned[shard]
            replay = entry <= owned.replay_until
            before = turn.tokens
            self._flows.fold(entry, message, turn, replay)
            if replay:
                self._metrics.replayed.inc(turn.tokens - before)
            owned.last = entry
            owned.steps += 1
        self._flows.end_turn(turn)
        return turn

    async def _send(self, deltas: dict[str, list[Delta]]) -> None:
        await asyncio.gather(
            *(
                send(
                    self._redis, self._keys.deltas(gateway), Deltas(tuple(items)), max_len=self._settings.deltas_max_len
                )
                for gateway, items in deltas.items()
            )
        )

    async def _end(self, turn: Turn) -> None:
        if turn.unasked:
            await self._records.cancel(turn.unasked)
        if turn.finished:
            await self._records.delete(turn.finished)

    def _count(self, turn: Turn) -> None:
        self._metrics.tokens.inc(turn.tokens)
        self._metrics.deltas.inc(turn.sent)
        self._metrics.open.set(len(self._flows))

    # ------------------------------------------------------------------------------------------------ the journal

    async def _save(self, flows: list[Flow]) -> None:
        """Write the journals, then what records say of them, so that a record never promises tokens that are lost."""
        if not flows:
            return
        begins = [flow.begin() for flow in flows if flow.begin_due]
        refused = set(
            await self._records.write_journal(
                [(flow.request_id, flow.written, flow.tokens[flow.written :]) for flow in flows],
                [begin for begin in begins if begin is not None],
            )
        )
        saved = [flow for flow in flows if flow.request_id not in refused]
        for flow in saved:
            flow.saved()
        for flow in flows:
            if flow.request_id in refused:
                flow.written, flow.begin_due = 0, True
        self._metrics.journal_writes.inc(len(saved))

    async def _trim(self) -> None:
        """Cut what no new owner would need. What has waited since before the last time is journaled first, so that a
        request that stands still does not hold the stream."""
        for shard, owned in self._owned.items():
            if owned.steps < self._settings.trim_every:
                continue
            await self._save(self._flows.waiting(shard, owned.trimmed_at))
            milliseconds, number = self._flows.oldest(shard) or (owned.last[0], owned.last[1] + 1)
            await command(self._redis, "XTRIM", self._keys.tokens(shard), "MINID", "~", f"{milliseconds}-{number}")
            owned.trimmed_at = owned.last
            owned.steps = 0

    # ------------------------------------------------------------------------------------------------ shards

    async def _keep_shards(self) -> set[int]:
        """Now and then look who is there, and own a fair share. Returns the shards gained or lost."""
        if self._clock() < self._own_at:
            return set()
        asked_at = self._clock()
        replicas = {
            replica.name for replica in await live(self._redis, self._keys, SERVICE) if replica.state != "draining"
        }
        kept = await self._shards.balance(replicas, self._owned)
        lost = {shard for shard, owned in self._owned.items() if kept.get(shard) != owned.epoch}
        for shard in lost:
            self._disown(shard)
        gained = {shard: epoch for shard, epoch in kept.items() if shard not in self._owned}
        await self._begin_shards(gained)
        self._own_at = asked_at + self._interval_ms / 1000
        return lost | gained.keys()

    async def _begin_shards(self, epochs: dict[int, int]) -> None:
        for shard, epoch in epochs.items():
            key = self._keys.tokens(shard)
            newest = await command(self._redis, "XREVRANGE", key, "+", "-", "COUNT", 1)
            self._owned[shard] = Owned(epoch, _parse(str(newest[0][0], "ascii")) if newest else (0, 0))
            self._reader.positions[key] = "0"
            _log.info("shard taken", extra={"shard": shard, "epoch": epoch})

    def _disown(self, shard: int) -> None:
        del self._owned[shard]
        del self._reader.positions[self._keys.tokens(shard)]
        self._flows.drop(shard)
        _log.info("shard given up", extra={"shard": shard})


def _parse(entry_id: str) -> EntryId:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
