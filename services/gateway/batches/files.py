"""Files in Redis, in chunks, within a budget of bytes.

They are in Redis, and not in a directory, because a batch outlives the gateway that took it: whichever gateway goes on
needs its input, and any may be asked for its output. A directory would have to be one volume that all gateways write
to, and a result and the note that its line is done could not be written in one step, as `finish_line.lua` does.
"""

import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
from redis.asyncio import Redis

from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.errors import Failure, RequestError, unreadable

HERE = Path(__file__).parent
CHUNK = 1 << 20
PREFIX = "file-"
MOST_FILES = 10_000  # of one API key, output included, beyond which it uploads no more
UPLOAD_S = 3600  # for which a file may be incomplete: its gateway has died, if it is then

Args = list[str | int | float | bytes]  # of a script

INPUT, OUTPUT = "batch", "batch_output"  # purposes


class FileLimits(msgspec.Struct, frozen=True):
    """Limits on files."""

    keep_s: int  # the longest that a file is kept after its creation
    budget_bytes: int  # of all files together
    owner_bytes: int  # of those of one API key
    file_bytes: int  # of one upload
    lines: int  # of one upload
    line_bytes: int


class About(msgspec.Struct, frozen=True, omit_defaults=True):
    """Description of a complete file. Fields may be added at the end, with defaults."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    lines: int
    created_at: int  # unix seconds
    expires_at: int
    trace: str | None = None  # traceparent of its upload

    def resource(self) -> dict[str, object]:
        """Return the file as OpenAI's clients read it."""
        hidden = {"owner", "lines", "trace"}
        shown = {name: value for name, value in msgspec.structs.asdict(self).items() if name not in hidden}
        return {**shown, "object": "file", "status": "processed"}


class FileStore:
    """Reader and writer of files."""

    def __init__(self, redis: Redis, keys: Keys, limits: FileLimits) -> None:
        self.limits = limits
        self._redis = redis
        self._keys = keys
        self.index = [keys.files(), keys.file_sizes()]  # KEYS of the scripts
        self._write = redis.register_script(read_script("write_file", HERE))
        self._publish = redis.register_script(read_script("publish_file", HERE))
        self._delete = redis.register_script(read_script("delete_file", HERE))

    @property
    def prefix(self) -> str:
        """Prefix of the keys of files, for scripts."""
        return self._keys.file("")

    async def check_count(self, owner: str) -> None:
        """Check that an owner may upload one more file.

        Raises:
            RequestError: 413, it has too many.
        """
        await self.sweep()
        count = await command(self._redis, "ZCARD", self._keys.files_of(owner))
        if count >= MOST_FILES:
            text = f"This API key has {count} files, of {MOST_FILES} at most. Delete files that are not needed."
            raise RequestError(Failure(413, text, param="file", code="too_many_files"))

    async def write(self, file_id: str, owner: str, offset: int, piece: bytes) -> None:
        """Append to an upload that has `offset` bytes.

        Raises:
            RequestError: 413, there is no room for it.
        """
        limits = self.limits
        args: Args = [self.prefix, file_id, owner, int(time.time()) + UPLOAD_S, limits.budget_bytes, limits.owner_bytes]
        args += [offset, piece]
        taken = await self._write(keys=self.index, args=args)
        if taken >= 0:
            raise RequestError(_full(taken, limits))

    async def publish(self, about: About) -> bool:
        """Let the owner see a file; return False if it is gone."""
        args: Args = [self.prefix, about.id, msgspec.json.encode(about), time.time(), about.expires_at]
        return bool(await self._publish(keys=self.index, args=args))

    async def find(self, file_id: str, owner: str) -> About:
        """Return what a file is.

        Raises:
            RequestError: 404, there is none, or it is another owner's; 500, it cannot be read.
        """
        [found] = await self._values([file_id])
        about = _about(*found)
        if about is None or about.owner != owner:
            raise no_file(file_id)
        return about

    async def listed(self, owner: str) -> list[str]:
        """Return the ids of an owner's files, newest first."""
        await self.sweep()
        found = await command(self._redis, "ZREVRANGE", self._keys.files_of(owner), 0, -1)
        return [str(name, "ascii") for name in found]

    async def describe(self, file_ids: Sequence[str]) -> list[About]:
        """Return what those of these files are that there are and that can be read."""
        return [about for values in await self._values(file_ids) if (about := _readable(*values)) is not None]

    async def chunks(self, file_id: str) -> AsyncIterator[bytes]:
        """Yield the bytes of a file, a chunk at a time.

        Raises:
            RequestError: 404, it is gone, or was deleted meanwhile.
        """
        count = await command(self._redis, "HGET", self._keys.file(file_id), "chunks")
        for n in range(int(count or 0)):
            chunk = await command(self._redis, "GET", self._keys.file_chunk(file_id, n))
            if chunk is None:
                raise no_file(file_id)
            yield chunk
        if count is None:
            raise no_file(file_id)

    async def size(self, file_id: str) -> int | None:
        """Return the bytes of a file, complete or not; None if there is none."""
        size = await command(self._redis, "HGET", self._keys.file(file_id), "size")
        return None if size is None else int(size)

    async def keep(self, file_id: str, until: int) -> None:
        """Keep a file at least until then, in unix seconds."""
        await command(self._redis, "ZADD", self._keys.files(), "XX", "GT", until, file_id)

    async def delete(self, file_id: str) -> None:
        """Delete a file, complete or not, if there is one."""
        await self._delete(keys=self.index, args=[self.prefix, file_id])

    async def sweep(self) -> None:
        """Delete files that are over."""
        await self.delete("")

    async def _values(self, file_ids: Sequence[str]) -> list[tuple[bytes | None, float | None]]:
        """Return the description and the expiry of each."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for file_id in file_ids:
                pipe.hget(self._keys.file(file_id), "about")
                pipe.zscore(self._keys.files(), file_id)
            found = await pipe.execute()
        return list(zip(found[::2], found[1::2], strict=True))


def no_file(name: str) -> RequestError:
    """Return a 404: no such file is kept, or it belongs to another API key."""
    return RequestError(Failure(404, f"There is no file {name[:64]!r}.", param="id", code="file_not_found"))


def _readable(about: bytes | None, expiry: float | None) -> About | None:
    try:
        return _about(about, expiry)
    except RequestError:
        return None


def _about(about: bytes | None, expiry: float | None) -> About | None:
    """
    Raises:
        RequestError: 500, it cannot be read.
    """
    if about is None or expiry is None or expiry <= time.time():
        return None
    try:
        return msgspec.json.decode(about, type=About)
    except msgspec.MsgspecError as error:
        raise RequestError(unreadable("the description of the file")) from error


def _full(taken: int, limits: FileLimits) -> Failure:
    text = (
        f"There is no room for this file: files take {taken} bytes, of {limits.budget_bytes} for all and "
        f"{limits.owner_bytes} for one API key. Delete files that are not needed."
    )
    return Failure(413, text, param="file", code="files_budget_exceeded")
