"""Logs: streams read by plain XREAD, from anywhere and again. Work streams are in `shared/bus/work_stream.py`."""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.client import MAX_BLOCK_MS, command
from shared.bus.wire import Wire
from shared.errors import ProtocolError
from shared.log import logger
from shared.message_codec import from_entry, to_entry, translated_entry
from shared.message_versions import versioned_write
from shared.messages import Message
from shared.metrics import Hop
from shared.redis_errors import is_wrong_type

LOST_S = 3.0  # Redis promises to lose no more than two seconds with its host (`appendfsync everysec`)

_log = logger(__name__)


def _flat(fields: Mapping[bytes, bytes]) -> list[bytes]:
    return [word for pair in fields.items() for word in pair]


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the fields of an entry, as Redis replies with them."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


@versioned_write
async def send(redis: Redis, key: str, message: Message, *, max_len: int | None = None) -> str:
    """Append one message, trimming the stream approximately to `max_len`; return the entry id."""
    trim = () if max_len is None else ("MAXLEN", "~", max_len)
    return str(await command(redis, "XADD", key, *trim, "*", *_flat(to_entry(message))), "ascii")


@versioned_write
async def reply(redis: Redis, key: str, message: Message, max_len: int) -> bool:
    """Append one message to a stream that its reader creates, unless the reader has deleted it.

    Returns whether the stream exists.
    """
    fields = _flat(to_entry(message))
    try:
        return await command(redis, "XADD", key, "NOMKSTREAM", "MAXLEN", "~", max_len, "*", *fields) is not None
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
        return False


class LogWriter:
    """Writer of message after message to one stream, over a connection of its own. Calls must not overlap.

    A server that comes back, or takes over, may have lost what it had acknowledged last. So over a new connection the
    messages of the LOST_S before the last one are sent again, before the next one: readers drop what they have. However
    old they are: nobody knows when in between, or for how long, the server was away.
    """

    def __init__(self, redis: Redis, key: str) -> None:
        self._wire = Wire(redis, self._recent_words)
        self._key = key
        # As bytes: objects would be looked at by the garbage collector for as long.
        self._recent: deque[tuple[float, dict[bytes, bytes]]] = deque()

    @versioned_write
    async def send(self, message: Message) -> None:
        """Append one message; twice, when the connection breaks at the wrong moment."""
        fields = to_entry(message)
        await self._wire.call("XADD", self._key, "*", *_flat(fields))
        now = monotonic()
        self._recent.append((now, fields))
        while now - self._recent[0][0] > LOST_S:
            self._recent.popleft()

    def _recent_words(self) -> list[list[str | bytes]]:
        """Return the commands that send them again, in the version that everybody reads by now."""
        entries = [translated_entry(fields) or fields for _, fields in self._recent]
        return [["XADD", self._key, "*", *_flat(fields)] for fields in entries]


class LogReader:
    """Reader of one or more plain streams from a position on: `tokens:{shard}`, `deltas:{gateway}`, `control`.

    Reading never consumes: `positions` (stream key -> id of the last entry seen) is kept here, may be changed between
    reads, and may start anywhere: "0" is before the first entry, "$" the end of the stream at the first read. The
    reader has a connection of its own from its first read on; reads must not overlap.
    """

    def __init__(self, redis: Redis, positions: dict[str, str], hop: str | None = None) -> None:
        """`hop`: name of the streams in the metric millrace_hop_seconds; None for streams that carry no requests."""
        self._wire = Wire(redis)
        self._hop = None if hop is None else Hop(hop)
        self.positions = dict(positions)

    async def read(self, count: int, block_ms: int) -> list[tuple[str, str, Message]]:
        """Return (stream key, entry id, message) of at most `count` entries a stream, after the current positions.

        Waits at most `block_ms` (0: does not wait) while there are none. Skips entries that are damaged or of another
        version, with a line in the log for all of a read.
        """
        if not self.positions:
            await asyncio.sleep(block_ms / 1000)
            return []
        await self.pin()
        messages: list[tuple[str, str, Message]] = []
        while not messages:
            page = await self._read_page(count, min(block_ms, MAX_BLOCK_MS))
            if not page:
                break
            for stream, entries in page:
                self._decode(str(stream, "utf-8"), entries, messages)
            block_ms = 0  # behind a page that nobody can read
        if self._hop is not None:
            self._hop.read(entry_id for _, entry_id, _ in messages)
        return messages

    async def _read_page(self, count: int, block_ms: int) -> Sequence[tuple[bytes, Sequence[tuple[bytes, Any]]]]:
        wait = ("BLOCK", block_ms) if block_ms > 0 else ()
        words = ("XREAD", "COUNT", count, *wait, "STREAMS", *self.positions, *self.positions.values())
        return await self._wire.call(*words, wait_s=block_ms / 1000) or ()

    async def pin(self) -> None:
        """Replace "$" by the id it means now: Redis would resolve it at every read, and skip entries between two."""
        for stream, position in self.positions.items():
            if position == "$":
                newest = await self._wire.call("XREVRANGE", stream, "+", "-", "COUNT", 1)
                self.positions[stream] = str(newest[0][0], "ascii") if newest else "0-0"

    async def close(self) -> None:
        """Give the connection back. A reader that lives as long as the client need not be closed."""
        await self._wire.close()

    def _decode(
        self, stream: str, entries: Iterable[tuple[bytes, Sequence[bytes]]], into: list[tuple[str, str, Message]]
    ) -> None:
        """Append to `into` what can be read."""
        skipped, reason = 0, ""
        for raw_id, fields in entries:
            self.positions[stream] = entry_id = str(raw_id, "ascii")
            try:
                into.append((stream, entry_id, from_entry(pairs(fields))))
            except ProtocolError as error:
                skipped, reason = skipped + 1, str(error)
        if skipped:
            _log.error("unreadable entries skipped", extra={"stream": stream, "entries": skipped, "reason": reason})
