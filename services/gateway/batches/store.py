"""Batches in Redis: created by any gateway, worked on by the one that holds the lease, and read by all."""

import time
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
from redis.asyncio import Redis

from services.gateway.batches import batch as states
from services.gateway.batches.batch import About, Batch
from services.gateway.batches.files import CHUNK, Args, FileStore
from services.gateway.batches.lines import LineError
from services.gateway.errors import too_many
from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.errors import Failure, RequestError, unreadable

HERE = Path(__file__).parent
MOST_BATCHES = 2000  # of one API key, with those that have ended and are kept
_LOST = -2


class LeaseLostError(Exception):
    """Another gateway works on the batch."""


class BatchStore:
    """Reader and writer of batches, for one gateway."""

    def __init__(self, redis: Redis, keys: Keys, files: FileStore, gateway: str, lease_ms: int) -> None:
        self.lease_ms = lease_ms
        self._redis = redis
        self._keys = keys
        self._files = files
        self._gateway = gateway
        self._create = redis.register_script(read_script("create_batch", HERE))
        self._claim = redis.register_script(read_script("claim_batches", HERE))
        self._renew = redis.register_script(read_script("renew_batch", HERE))
        self._release = redis.register_script(read_script("release_batch", HERE))
        self._move = redis.register_script(read_script("move_batch", HERE))
        self._finish_line = redis.register_script(read_script("finish_line", HERE))

    # ------------------------------------------------------------------------------------------------- for clients

    async def create(self, about: About, lines: int, tenant: str, most_lines: int | None) -> None:
        """Create a batch of so many lines, of which the tenant may have `most_lines` under way.

        Raises:
            RequestError: 429, it has too many, or the owner too many batches.
        """
        keys = [self._keys.batch(about.id), self._keys.batches(), self._keys.batches_of(about.owner)]
        limit = "" if most_lines is None else most_lines
        args: Args = [self._keys.batch(""), about.id, msgspec.json.encode(about), time.time()]
        args += [lines, tenant, limit, MOST_BATCHES, about.owner]
        refused, count = await self._create(keys=keys, args=args)
        if refused == b"batches":
            raise too_many(f"This API key has {count} batches, ended ones included; the limit is {MOST_BATCHES}.")
        if refused:
            text = f"The API key {tenant!r} has a limit of {limit} lines of batches under way; it has {count}"
            raise too_many(f"{text}, and this batch has {lines}.")

    async def find(self, batch_id: str, owner: str) -> Batch:
        """Return a batch.

        Raises:
            RequestError: 404, there is none, or it is another owner's; 500, it cannot be read.
        """
        batch = await self.read(batch_id)
        if batch is None or batch.about.owner != owner:
            raise no_batch(batch_id)
        return batch

    async def listed(self, owner: str) -> list[str]:
        """Return the ids of an owner's batches, newest first."""
        found = await command(self._redis, "ZREVRANGE", self._keys.batches_of(owner), 0, -1)
        return [str(name, "ascii") for name in found]

    async def describe(self, batch_ids: Sequence[str]) -> list[Batch]:
        """Return those of these batches that there are and that can be read."""
        return [batch for batch in map(_readable, await self._values(batch_ids)) if batch is not None]

    async def read(self, batch_id: str) -> Batch | None:
        """Return a batch, whose ever it is; None if there is none.

        Raises:
            RequestError: 500, it cannot be read.
        """
        [values] = await self._values([batch_id])
        return _decoded(values) if any(values) else None

    async def _values(self, batch_ids: Sequence[str]) -> list[list[bytes | None]]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for batch_id in batch_ids:
                pipe.hmget(self._keys.batch(batch_id), states.FIELDS)
            found: list[list[bytes | None]] = await pipe.execute()
        return found

    async def cancel(self, batch_id: str) -> bool:
        """Have a batch cancelled by whoever works on it; return False if that has no sense any more."""
        return await self._moved(batch_id, "", states.CANCELLING)

    # ------------------------------------------------------------------------------------------ for who works on it

    async def claim(self, places: int, held: Collection[str]) -> tuple[list[str], list[str]]:
        """Take the leases of batches that nobody works on, for a gateway that works on `held`.

        Returns those, and those of `held` that it must give up for them: their owner has more than its part.
        """
        args: Args = [self._keys.batch(""), self._gateway, self.lease_ms, places, *held]
        claimed, given_up = await self._claim(keys=[self._keys.batches()], args=args)
        return [str(name, "ascii") for name in claimed], [str(name, "ascii") for name in given_up]

    async def renew(self, batch_id: str) -> str:
        """Renew a lease; return the batch's status.

        Raises:
            LeaseLostError: it has expired, and another gateway may have it.
        """
        keys = [self._keys.batch(batch_id), self._keys.batch_lease(batch_id)]
        status = await self._renew(keys=keys, args=[self._gateway, self.lease_ms])
        if status is None:
            raise LeaseLostError(batch_id)
        return str(status, "ascii")

    async def release(self, batch_id: str) -> None:
        """Give a lease up."""
        await self._release(keys=[self._keys.batch_lease(batch_id)], args=[self._gateway])

    async def forget(self, batch_id: str) -> None:
        """Let nobody work on a batch any more that cannot be read."""
        await command(self._redis, "ZREM", self._keys.batches(), batch_id)

    async def move(self, batch_id: str, status: str, errors: Sequence[LineError] = (), keep_s: int = 0) -> bool:
        """Give a batch another status; return False if it has one meanwhile that does not lead there.

        `keep_s`: seconds for which a batch that has ended is kept.

        Raises:
            LeaseLostError: another gateway works on it.
        """
        return await self._moved(batch_id, self._gateway, status, errors, keep_s)

    async def done(self, batch_id: str) -> bytes:
        """Return the bitmap of the lines that have a result."""
        return await command(self._redis, "GET", self._keys.batch_done(batch_id)) or b""

    async def finish_line(self, about: About, number: int, counter: str, result: bytes) -> bool:
        """Keep the result of a line, once; return False if there is no room for it.

        `counter`: completed, failed or expired. All but the completed go to the file of errors.

        Raises:
            LeaseLostError: another gateway works on the batch.
        """
        keys = [self._keys.batch(about.id), self._keys.batch_lease(about.id), self._keys.batch_done(about.id)]
        file_id = about.output_file_id if counter == states.COMPLETED else about.error_file_id
        limits = self._files.limits
        args: Args = [self._files.prefix, file_id, about.owner, about.expires_at + limits.keep_s]
        pieces = [result[at : at + CHUNK] for at in range(0, len(result), CHUNK)]
        args += [limits.budget_bytes, limits.owner_bytes, self._gateway, number, counter, *pieces]
        taken = await self._finish_line(keys=[*self._files.index, *keys], args=args)
        if taken == _LOST:
            raise LeaseLostError(about.id)
        return bool(taken < 0)

    async def _moved(
        self, batch_id: str, holder: str, status: str, errors: Sequence[LineError] = (), keep_s: int = 0
    ) -> bool:
        lease, done = self._keys.batch_lease(batch_id), self._keys.batch_done(batch_id)
        fields: Args = [f"{status}_at", int(time.time())]
        if errors:
            fields += ["errors", msgspec.json.encode(errors)]
        moved = await self._move(
            keys=[self._keys.batch(batch_id), lease, done, self._keys.batches()],
            args=[holder, batch_id, " ".join(states.BEFORE[status]), status, keep_s, *fields],
        )
        if moved < 0:
            raise LeaseLostError(batch_id)
        return bool(moved)


def no_batch(name: str) -> RequestError:
    """Return a 404: no such batch is kept, or it belongs to another API key."""
    return RequestError(Failure(404, f"There is no batch {name[:64]!r}.", param="id", code="batch_not_found"))


def _readable(values: Sequence[bytes | None]) -> Batch | None:
    try:
        return _decoded(values)
    except RequestError:
        return None


def _decoded(values: Sequence[bytes | None]) -> Batch:
    """
    Raises:
        RequestError: 500, it cannot be read.
    """
    named = {name: value for name, value in zip(states.FIELDS, values, strict=True) if value is not None}
    try:
        return states.decode(named)
    except (msgspec.MsgspecError, ValueError, KeyError) as error:
        raise RequestError(unreadable("the batch")) from error
