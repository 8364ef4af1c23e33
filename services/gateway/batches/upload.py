"""Writer of a file that a client uploads: checks its size and its lines while it arrives, and stores it in chunks."""

import contextlib
import time

from redis.exceptions import RedisError

from services.gateway.batches.files import CHUNK, INPUT, About, FileStore
from services.gateway.batches.lines import LineCounter
from shared.errors import Failure, RequestError, invalid


class FileWriter:
    """One upload. It holds the bytes that make no whole chunk yet, and a chunk while that is written."""

    def __init__(self, store: FileStore, file_id: str, owner: str) -> None:
        self._store = store
        self._id = file_id
        self._owner = owner
        self._lines = LineCounter(store.limits.line_bytes)
        self._written = 0
        self._rest = bytearray()

    @property
    def held(self) -> int:
        """Bytes that are here and not stored."""
        return len(self._rest)

    @property
    def has_stored(self) -> bool:
        """True once a chunk is stored."""
        return self._written > 0

    def needs(self, data: bytes) -> int:
        """Return the bytes that are held while `write` takes these."""
        held = len(self._rest) + len(data)
        return held + CHUNK if held >= CHUNK else held

    async def write(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            RequestError: 413, the file or a line of it is too long, or there is no room for it.
        """
        self._rest += data
        limits = self._store.limits
        if self._written + len(self._rest) > limits.file_bytes:
            raise _too_large(f"The file is larger than the limit of {limits.file_bytes} bytes.")
        self._lines.feed(data)
        self._check_lines()
        while len(self._rest) >= CHUNK:
            await self._flush()

    async def close(self, filename: str, keep_s: int, trace: str | None = None) -> About:
        """Store the rest, and let the owner see the file; `trace` is the traceparent of the upload.

        Raises:
            RequestError: 400, the file has no line; 413, it is too long, or there is no room for it.
        """
        self._lines.end()
        self._check_lines()
        if not self._lines.filled:
            raise invalid("`file` is empty: it must have a request a line.", "file")
        await self._flush()
        now = int(time.time())
        lines = self._lines.filled
        about = About(self._id, self._owner, filename, INPUT, self._written, lines, now, now + keep_s, trace)
        if not await self._store.publish(about):
            raise RequestError(Failure(408, "The upload took too long.", type="timeout_error", code="timeout"))
        return about

    async def discard(self) -> None:
        """Delete what was stored. If that fails, it expires."""
        with contextlib.suppress(RedisError):
            await self._store.delete(self._id)

    def _check_lines(self) -> None:
        limit = self._store.limits.lines
        if self._lines.filled > limit or self._lines.count > limit + 1:  # one more: nothing, behind the last line end
            raise _too_large(f"The file has more than {limit} lines.")

    async def _flush(self) -> None:
        with memoryview(self._rest) as held:
            piece = bytes(held[:CHUNK])
        if piece:
            await self._store.write(self._id, self._owner, self._written, piece)
        self._written += len(piece)
        del self._rest[:CHUNK]


def _too_large(text: str) -> RequestError:
    return RequestError(Failure(413, text, param="file", code="file_too_large"))
