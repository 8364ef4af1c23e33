"""The main loop: read engine steps, fold them, send deltas, and now and then write journals and trim.

The order within a turn makes every crash harmless. Deltas are sent before their tokens are journaled, and tokens are
journaled before the stream is trimmed or the request ends. So everything that a new owner finds in a journal was sent,
and everything that is in no journal is still in the stream, which the new owner reads from its beginning.

Everything is written under the fence of this replica's shards. A worker that was paused and has lost a shard meanwhile
writes nothing: its next write fails, and it drops all state and starts again with the shards that it then owns.
"""

import asyncio
import math
from collections.abc import Callable

from services.postproc import spans
from services.postproc.metrics import PostprocMetrics
from services.postproc.outbox import Outbox
from services.postproc.owned_shards import OwnedShard, OwnedShards, next_entry, parse_entry_id
from services.postproc.request_state import EntryId, Journal, TurnOutput
from services.postproc.request_states import RequestStates
from services.postproc.settings import PostprocSettings
from shared.bus.keys import Keys
from shared.bus.records import Record, Records, UnreadableRecord
from shared.bus.retry import retry_until_available
from shared.bus.streams import LogReader
from shared.errors import FencedError, ProtocolError
from shared.log import logger
from shared.message_versions import VERSION, WRITES
from shared.messages import Attach, Tokens
from shared.tracing import Tracing

_log = logger(__name__)

Step = tuple[int, EntryId, Tokens | Attach]  # shard, entry id, message


class Worker:
    """The service (shared.service.Service). Renew the lease before the first turn."""

    def __init__(
        self,
        *,
        keys: Keys,
        settings: PostprocSettings,
        reader: LogReader,
        records: Records,
        states: RequestStates,
        shards: OwnedShards,
        outbox: Outbox,
        metrics: PostprocMetrics,
        clock: Callable[[], float],
        tracing: Tracing,
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._records = records
        self._states = states
        self._shards = shards
        self._outbox = outbox
        self._metrics = metrics
        self._clock = clock
        self._tracing = tracing
        self._shard_of_stream = {keys.tokens(shard): shard for shard in range(settings.shards)}
        self._sweep_at = -math.inf
        self._turns: asyncio.Task[None] | None = None
        self._draining = False

    # ------------------------------------------------------------------------------------------------ phases

    async def startup(self) -> None:
        """
        Raises:
            ConfigError: the deployment has another number of shards.
        """
        await retry_until_available("shards", self._shards.check_count)

    async def serve(self) -> None:
        """Run turns until cancelled. The turn that runs then goes on: `drain` waits for its end."""
        self._turns = asyncio.create_task(self._run_turns())
        await asyncio.shield(self._turns)

    async def _run_turns(self) -> None:
        while not self._draining:
            await self.run_turn()

    async def drain(self) -> None:
        """Hand the shards over, with nothing in their streams that was read here: who is older could not read it.

        What a turn has folded is trimmed here, so the turn first writes all that follows from it: its deltas, and the
        ends of its requests.
        """
        self._draining = True
        if self._turns is not None:
            await self._turns
        try:
            for shard, owned in self._shards.items():
                await self._trim_shard(shard, owned, journal_before=next_entry(owned.last), exactly=True)
        except FencedError as fenced:
            _log.warning("shards were lost to another replica while draining", extra={"reason": str(fenced)})
        await retry_until_available("hand over", self._shards.hand_over)

    async def close(self) -> None:
        """Stop where a drain was cut off. The maker of the Redis client closes it."""
        self._draining = True  # also if there was none: a turn that ends in spite of being cancelled is the last one
        if self._turns is not None:
            self._turns.cancel()
            await asyncio.wait([self._turns])

    def load(self) -> dict[str, float]:
        return {"open": float(len(self._states)), "shards": float(len(self._shards)), **self._metrics.load()}

    # ------------------------------------------------------------------------------------------------ the loop

    async def run_turn(self) -> None:
        """Wait for engine steps, for a fraction of the lease at most, and process them.

        While Redis does not answer, this waits, and then goes on where it was. Gateways drop by their sequence numbers
        the deltas that are thereby sent twice.
        """
        try:
            await self._shards.rebalance()
            if steps := await self._read_steps():
                await self._process(steps)
            else:
                await self._trim_all()
            await self._sweep()
        except FencedError as fenced:
            _log.warning("shards were lost to another replica; starting over", extra={"reason": str(fenced)})
            self._shards.start_over()

    async def _read_steps(self) -> list[Step]:
        # The requests of an entry that cannot be read have a gap now, which ends each in an error with its next token.
        entries = await retry_until_available(
            "read", lambda: self._reader.read(self._settings.read_count, self._shards.look_ms)
        )
        return [
            (self._shard_of_stream[stream], parse_entry_id(entry_id), message)
            for stream, entry_id, message in entries
            if isinstance(message, Tokens | Attach)
        ]

    async def _process(self, steps: list[Step]) -> None:
        output = TurnOutput()
        await self._open_unknown(steps, output)
        self._fold(steps, output)
        await self._send(output)
        await self._journal(output)
        await self._end(output)
        await self._trim()
        self._count(output)

    async def _open_unknown(self, steps: list[Step], output: TurnOutput) -> None:
        generating, attached = self._states.find_unknown([message for _, _, message in steps])
        unknown = list(generating | attached)
        if not unknown:
            return
        records = await retry_until_available("records", lambda: self._records.get(unknown))
        self._states.ignore(generating - records.keys())
        for request_id, record in records.items():
            if isinstance(record, UnreadableRecord):
                self._states.fail_unreadable(request_id, record.gateways, record.reason, output)
                continue
            try:
                await self._open(record, request_id in generating, request_id in attached, output)
            except ProtocolError as error:
                self._states.fail_unreadable(request_id, record.gateways, str(error), output)

    async def _open(self, record: Record, generating: bool, attached: bool, output: TurnOutput) -> None:
        """
        Raises:
            ProtocolError: the journal, or what is beside it, is damaged.
        """
        request_id = record.request.id
        if record.finish is not None:
            self._states.ignore([request_id])
            if attached:
                self._states.restore_finished(record, await self._read_journal(record), output)
        elif record.begin is not None or generating:
            self._states.open_request(record, await self._read_journal(record), output)
        else:
            output.queued.add(request_id)

    async def _read_journal(self, record: Record) -> Journal:
        request = record.request
        if record.begin is None:
            return Journal()
        tokens = await retry_until_available("journal", lambda: self._records.read_journal(request.id))
        self._metrics.replayed.inc(len(tokens))
        if not request.output.logprobs:
            return Journal(tokens)
        return Journal(tokens, await retry_until_available("journal", lambda: self._records.read_logprobs(request.id)))

    def _fold(self, steps: list[Step], output: TurnOutput) -> None:
        for shard, entry, message in steps:
            owned = self._shards[shard]
            replay = entry <= owned.replay_until
            if isinstance(message, Attach):
                self._states.attach(message, output)
            else:
                before = output.tokens_folded
                self._states.fold_step(entry, message, output, replay)
                if replay:
                    self._metrics.replayed.inc(output.tokens_folded - before)
            owned.last = entry
            owned.steps += 1
        self._states.collect(output)

    async def _send(self, output: TurnOutput) -> None:
        if output.deltas:
            await self._outbox.send(output.deltas)
        if output.ended:
            spans.record(self._tracing, output.ended)
            called = [state.answer.called for state in output.ended if state.request.output.tools]
            self._metrics.count_tool_parsing(called)

    async def _journal(self, output: TurnOutput) -> None:
        if states := output.to_journal + output.to_retain:
            self._metrics.journal_writes.inc(await self._outbox.journal(states))

    async def _end(self, output: TurnOutput) -> None:
        if output.to_cancel:
            await self._outbox.cancel(output.to_cancel)
        if output.to_retain:
            await self._outbox.retain(output.to_retain)
        if output.to_delete:
            await self._outbox.delete(output.to_delete)

    def _count(self, output: TurnOutput) -> None:
        self._metrics.tokens.inc(output.tokens_folded)
        self._metrics.deltas.inc(output.deltas_added)
        self._metrics.failures.inc(output.failures)
        self._metrics.open.set(len(self._states))

    # ------------------------------------------------------------------------------------------------ now and then

    async def _trim(self) -> None:
        """Trim streams of entries that no new owner would need.

        Requests unsaved since before the last trim are journaled first, so that one that stands still does not hold
        the stream. While a living replica reads an older version only, all is journaled: it may be the next owner.
        """
        if WRITES.number < VERSION:
            await self._trim_all()
        for shard, owned in self._shards.items():
            if owned.steps >= self._settings.trim_every:
                await self._trim_shard(shard, owned, journal_before=owned.trimmed_at, exactly=False)

    async def _trim_all(self) -> None:
        """Journal everything that was read, so that the streams are empty."""
        for shard, owned in self._shards.items():
            if owned.steps:
                await self._trim_shard(shard, owned, journal_before=next_entry(owned.last), exactly=True)

    async def _trim_shard(self, shard: int, owned: OwnedShard, journal_before: EntryId, exactly: bool) -> None:
        written = await self._outbox.journal(self._states.unsaved_before(shard, journal_before))
        self._metrics.journal_writes.inc(written)
        await self._outbox.trim(shard, self._states.oldest_unsaved(shard) or next_entry(owned.last), exactly)
        owned.trimmed_at = owned.last
        owned.steps = 0

    async def _sweep(self) -> None:
        """Once a lease, fail the requests whose record Redis has lost, and delete what it has kept of them."""
        if self._clock() < self._sweep_at:
            return
        self._sweep_at = self._clock() + self._settings.lease_ms / 1000
        idle = self._states.sweep_idle()
        alive = await retry_until_available("exists", lambda: self._records.exists(idle))
        output = TurnOutput()
        self._states.fail_lost([request_id for request_id in idle if request_id not in alive], output)
        await self._send(output)
        await self._end(output)
        self._count(output)
