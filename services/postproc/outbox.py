"""All that postproc writes to Redis, under the fence of its shards: one script a write, whatever it carries."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from redis.asyncio import Redis

from services.postproc.owned_shards import OwnedShards
from services.postproc.request_state import EntryId, RequestState
from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.bus.records import Records
from shared.bus.retry import retry_until_available
from shared.bus.wire import Wire, WireScript
from shared.crash_points import crash_point
from shared.message_codec import to_entries
from shared.message_versions import versioned_write
from shared.messages import Delta, Deltas

HERE = Path(__file__).parent  # where the scripts are

T = TypeVar("T")


class Outbox:
    """The writes of an owner of shards. Each is idempotent, and repeated until Redis is available.

    Every write raises FencedError, having done nothing, when one of the fence's shards is not this replica's any more.
    """

    def __init__(self, redis: Redis, keys: Keys, records: Records, shards: OwnedShards, deltas_max_len: int) -> None:
        self._keys = keys
        self._records = records
        self._shards = shards
        self._deltas_max_len = deltas_max_len
        self._send_script = WireScript(Wire(redis), read_script("send_deltas", HERE))
        self._trim_script = redis.register_script(read_script("trim_tokens", HERE))

    @versioned_write
    async def send(self, deltas: Mapping[str, Sequence[Delta]]) -> None:
        """Send one message to every gateway in `deltas`."""
        version, entries = to_entries(Deltas(tuple(items)) for items in deltas.values())
        keys = [*map(self._keys.deltas, deltas)]
        words: list[str | bytes | int] = [self._deltas_max_len, version, *(entry[b"m"] for entry in entries)]
        await self._write("deltas", lambda: self._shards.fence.run(self._send_script, keys, words))

    async def journal(self, states: list[RequestState]) -> int:
        """Write journals, and the Begins of their records; return the number of journals written.

        Where Redis has lost a part of a journal, write all of it again.
        """
        written = 0
        while states:
            refused = await self._write_journals(states)
            for state in states:
                if state.request_id in refused:
                    state.mark_unjournaled()
                else:
                    state.mark_journaled()
            written += len(states) - len(refused)
            states = [state for state in states if state.request_id in refused]
        return written

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """Tell the engines that these answers have ended here."""
        await self._write("cancel", lambda: self._records.cancel(request_ids, self._shards.fence))

    async def retain(self, states: Sequence[RequestState]) -> None:
        """Keep the records and journals of answers that succeeded, as long as their requests ask for."""
        ended = [(state.request_id, state.finish_to_record(), state.request.retain_s) for state in states]
        await self._write("retain", lambda: self._records.retain(ended, self._shards.fence))

    async def delete(self, request_ids: Sequence[str]) -> None:
        """Delete the records and journals of requests that have ended."""
        await self._write("delete", lambda: self._records.delete(request_ids, self._shards.fence))

    async def trim(self, shard: int, before: EntryId, exactly: bool) -> None:
        """Cut a tokens stream below an entry id; if not `exactly`, as far as is cheap."""
        milliseconds, number = before
        keys, words = [self._keys.tokens(shard)], ["=" if exactly else "~", f"{milliseconds}-{number}"]
        await self._write("trim", lambda: self._shards.fence.run(self._trim_script, keys, words))

    async def _write_journals(self, states: list[RequestState]) -> set[str]:
        """Write new tokens; return the requests whose journal lacks the tokens before them."""
        writes = [(state.request_id, state.journaled, state.tokens[state.journaled :]) for state in states]
        begins = [begin for state in states if state.begin_unsaved and (begin := state.begin_to_record()) is not None]
        logprobs = [
            (state.request_id, state.logprobs[state.journaled :]) for state in states if state.logprobs is not None
        ]
        return set(
            await self._write(
                "journal", lambda: self._records.write_journal(writes, begins, logprobs, fence=self._shards.fence)
            )
        )

    async def _write(self, what: str, write: Callable[[], Awaitable[T]]) -> T:
        crash_point(f"postproc.{what}.before")
        done = await retry_until_available(what, write)
        crash_point(f"postproc.{what}.after")
        return done
