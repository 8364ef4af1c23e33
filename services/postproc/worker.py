"""The hot loop: read engine steps, fold them, send deltas, and now and then write journals and trim.

The order within a turn makes every crash harmless. Deltas are sent before their tokens are journaled, and tokens are
journaled before the stream is trimmed or the request ends; so whatever a new owner finds in a journal was sent, and
whatever is not in a journal is still in the stream, from whose beginning it starts.

All that is written for a shard is written under a fence, so a worker that was paused and has lost a shard meanwhile
writes nothing: it notices by that, forgets everything, and starts again with the shards it is given.
"""

import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.asyncio import Redis

from services.postproc import spans
from services.postproc.metrics import PostprocMetrics
from services.postproc.outbox import Outbox
from services.postproc.request_states import EntryId, Journal, RequestState, RequestStates, TurnOutput
from services.postproc.settings import PostprocSettings
from services.postproc.text.detokenize import Vocabulary
from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.leases import Fence, Shards, live
from shared.bus.records import Record, Records
from shared.bus.retry import retry_until_available
from shared.bus.streams import LogReader
from shared.crash_points import crash_point
from shared.errors import FencedError, ProtocolError
from shared.log import logger
from shared.messages import Attach, Tokens
from shared.tracing import OFF, Tracing

SERVICE = "postproc"

_LOOKS_A_LEASE = 12  # so that a dead replica's shards are taken soon after its lease has expired

_log = logger(__name__)

Step = tuple[int, EntryId, Tokens | Attach]  # shard, where it stands, what it says
T = TypeVar("T")


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
        tracing: Tracing = OFF,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._tracing = tracing
        self._records = Records(redis, keys)
        self._shards = Shards(redis, keys, SERVICE, settings.name, settings.shards)
        self._outbox = Outbox(redis, keys, settings.deltas_max_len)
        self._reader = LogReader(redis, {}, hop="tokens")
        self._states = RequestStates(vocabulary, settings.parsers(), settings.journal_every)
        self._shard_of = {keys.tokens(shard): shard for shard in range(settings.shards)}
        self._owned: dict[int, Owned] = {}
        self._fence = Fence(keys, settings.name, {})
        self._look_ms = max(1, settings.lease_ms // _LOOKS_A_LEASE)
        self._look_at = -math.inf
        self._sweep_at = -math.inf

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
        self._disown(list(self._owned))

    async def close(self) -> None:
        """Nothing is left to close: the client is closed by whoever made it."""

    def load(self) -> dict[str, float]:
        held = {"open": float(len(self._states)), "shards": float(len(self._owned))}
        return held | self._metrics.figures()

    # ------------------------------------------------------------------------------------------------ the loop

    async def turn(self) -> None:
        """Wait for engine steps, for a fraction of the lease at most, and deal with them.

        While Redis does not answer, this waits, and goes on where it was: what is sent twice thereby is dropped by its
        numbers.
        """
        try:
            await self._keep_shards()
            steps = await self._read()
            if steps:
                await self._deal_with(steps)
            else:
                await self._tidy_up()
            await self._sweep()
        except FencedError as fenced:
            _log.warning("shards were lost; starting again", extra={"reason": str(fenced)})
            self._disown(list(self._owned))
            self._look_at = -math.inf

    async def _read(self) -> list[Step]:
        try:
            entries = await retry_until_available(
                "read", lambda: self._reader.read(self._settings.read_count, self._look_ms)
            )
        except ProtocolError:
            # The requests in it have a gap now, which ends each in an error as soon as its next token comes.
            _log.exception("entry of a tokens stream skipped")
            return []
        return [
            (self._shard_of[stream], _parse(entry_id), message)
            for stream, entry_id, message in entries
            if isinstance(message, Tokens | Attach)
        ]

    async def _deal_with(self, steps: list[Step]) -> None:
        turn = TurnOutput()
        await self._open_strangers(steps, turn)
        self._fold(steps, turn)
        await self._send(turn)
        await self._save(turn.due + turn.kept)
        await self._end(turn)
        await self._trim()
        self._count(turn)

    async def _open_strangers(self, steps: list[Step], turn: TurnOutput) -> None:
        seen, asked = self._states.strangers([message for _, _, message in steps])
        strangers = list(seen | asked)
        if not strangers:
            return
        records = await retry_until_available("records", lambda: self._records.get(strangers))
        self._states.ignore(seen - records.keys())
        for request_id, record in records.items():
            if record.finish is not None:
                self._states.ignore([request_id])
                if request_id in asked:
                    self._states.recall(record, await self._journal(record), turn)
            elif record.begin is not None or request_id in seen:
                self._states.open(record, await self._journal(record), turn)
            else:
                turn.queued.add(request_id)

    async def _journal(self, record: Record) -> Journal:
        request = record.request
        if record.begin is None:
            return Journal()
        tokens = await retry_until_available("journal", lambda: self._records.read_journal(request.id))
        self._metrics.replayed.inc(len(tokens))
        if not request.output.logprobs:
            return Journal(tokens)
        return Journal(tokens, await retry_until_available("journal", lambda: self._records.read_logprobs(request.id)))

    def _fold(self, steps: list[Step], turn: TurnOutput) -> None:
        for shard, entry, message in steps:
            owned = self._owned[shard]
            replay = entry <= owned.replay_until
            if isinstance(message, Attach):
                self._states.attach(message, turn)
            else:
                before = turn.tokens
                self._states.fold(entry, message, turn, replay)
                if replay:
                    self._metrics.replayed.inc(turn.tokens - before)
            owned.last = entry
            owned.steps += 1
        self._states.end_turn(turn)

    async def _send(self, turn: TurnOutput) -> None:
        if turn.deltas:
            await self._write("deltas", lambda: self._outbox.send(turn.deltas, self._fence))
        spans.record(self._tracing, turn.ended)
        self._metrics.parsed([state.answer.called for state in turn.ended if state.request.output.tools])

    async def _end(self, turn: TurnOutput) -> None:
        if turn.unasked:
            await self._write("cancel", lambda: self._records.cancel(turn.unasked, self._fence))
        if turn.kept:
            ended = [(state.request_id, state.last_word(), state.request.retain_s) for state in turn.kept]
            await self._write("retain", lambda: self._records.retain(ended, self._fence))
        if turn.gone:
            await self._write("delete", lambda: self._records.delete(turn.gone, self._fence))

    async def _write(self, what: str, write: Callable[[], Awaitable[T]]) -> T:
        crash_point(f"postproc.{what}.before")
        done = await retry_until_available(what, write)
        crash_point(f"postproc.{what}.after")
        return done

    def _count(self, turn: TurnOutput) -> None:
        self._metrics.tokens.inc(turn.tokens)
        self._metrics.deltas.inc(turn.sent)
        self._metrics.failures.inc(turn.failures)
        self._metrics.open.set(len(self._states))

    # ------------------------------------------------------------------------------------------------ the journal

    async def _save(self, states: list[RequestState]) -> None:
        """Write journals, and with them what records say of them. Where Redis has lost some, write it all again."""
        while states:
            refused = await self._write_journals(states)
            for state in states:
                if state.request_id in refused:
                    state.unsaved()
                else:
                    state.saved()
            self._metrics.journal_writes.inc(len(states) - len(refused))
            states = [state for state in states if state.request_id in refused]

    async def _write_journals(self, states: list[RequestState]) -> set[str]:
        """Returns those whose journal lacks what is before this write."""
        writes = [(state.request_id, state.written, state.tokens[state.written :]) for state in states]
        begins = [begin for state in states if state.begin_due and (begin := state.begin()) is not None]
        logprobs = [
            (state.request_id, state.logprobs[state.written :]) for state in states if state.logprobs is not None
        ]
        return set(
            await self._write(
                "journal", lambda: self._records.write_journal(writes, begins, logprobs, fence=self._fence)
            )
        )

    async def _trim(self) -> None:
        """Cut what no new owner would need. What has waited since before the last time is journaled first, so that a
        request that stands still does not hold the stream."""
        for shard, owned in self._owned.items():
            if owned.steps >= self._settings.trim_every:
                await self._cut(shard, owned, owned.trimmed_at, exactly=False)

    async def _cut(self, shard: int, owned: Owned, journaled_before: EntryId, exactly: bool) -> None:
        await self._save(self._states.waiting(shard, journaled_before))
        before = self._states.oldest(shard) or _next(owned.last)
        await self._write("trim", lambda: self._outbox.trim(shard, before, exactly, self._fence))
        owned.trimmed_at = owned.last
        owned.steps = 0

    async def _tidy_up(self) -> None:
        """While nothing comes: journal everything, so that the streams are empty."""
        for shard, owned in self._owned.items():
            if owned.steps:
                await self._cut(shard, owned, _next(owned.last), exactly=True)

    async def _sweep(self) -> None:
        """Once a lease: forget the requests that Redis has forgotten."""
        if self._clock() < self._sweep_at:
            return
        self._sweep_at = self._clock() + self._settings.lease_ms / 1000
        idle = self._states.idle()
        alive = await retry_until_available("exists", lambda: self._records.exists(idle))
        turn = TurnOutput()
        self._states.forget([request_id for request_id in idle if request_id not in alive], turn)
        await self._send(turn)
        self._count(turn)

    # ------------------------------------------------------------------------------------------------ shards

    async def _keep_shards(self) -> None:
        """Now and then look who is there, and own a fair share."""
        if self._clock() < self._look_at:
            return
        looked_at = self._clock()
        replicas = await retry_until_available("replicas", lambda: live(self._redis, self._keys, SERVICE))
        ready = {replica.name for replica in replicas if replica.state == "ready"}
        epochs = await retry_until_available("shards", lambda: self._shards.balance(ready, self._owned))
        self._disown([shard for shard, owned in self._owned.items() if epochs.get(shard) != owned.epoch])
        gained = {shard: epoch for shard, epoch in epochs.items() if shard not in self._owned}
        await self._begin_shards(gained)
        self._fence = Fence(self._keys, self._settings.name, epochs)
        self._look_at = looked_at + self._look_ms / 1000

    async def _begin_shards(self, epochs: dict[int, int]) -> None:
        for shard, epoch in epochs.items():
            key = self._keys.tokens(shard)
            words = ("XREVRANGE", key, "+", "-", "COUNT", 1)
            newest = await retry_until_available("newest", lambda words=words: command(self._redis, *words))  # type: ignore[misc]
            self._owned[shard] = Owned(epoch, _parse(str(newest[0][0], "ascii")) if newest else (0, 0))
            self._reader.positions[key] = "0"
            _log.info("shard taken", extra={"shard": shard, "epoch": epoch})

    def _disown(self, shards: list[int]) -> None:
        for shard in shards:
            del self._owned[shard]
            del self._reader.positions[self._keys.tokens(shard)]
            self._states.drop(shard)
            _log.info("shard given up", extra={"shard": shard})


def _parse(entry_id: str) -> EntryId:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)


def _next(entry: EntryId) -> EntryId:
    return entry[0], entry[1] + 1
