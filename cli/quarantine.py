"""Command `millrace quarantine`: the dead-letter streams, with requests that crashed replica after replica.

An entry is named after the stream it was in and its id in the quarantine: generate/1700000000000-0. Its client was
answered with an error when it was quarantined. Text of clients is shown only with --body.

Exit status: 0 done; 1 an entry is not there, or cannot be run again; 2 the command could not be carried out.
"""

import asyncio
import json
import math
import secrets
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cli.connection import no_answer, parser
from services.gateway.request import answer_format
from shared.bus.blobs import EMBEDS, MEDIA, Blobs
from shared.bus.client import command, connect
from shared.bus.key_types import naming_wrong_types
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import COUNT, heeded_fields
from shared.bus.records import Records
from shared.errors import ConfigError, ProtocolError
from shared.message_codec import from_entry
from shared.message_fields import generation_of
from shared.messages import Encode, Generate, Request, unpack_ids
from shared.visible import visible

DONE, NOT_DONE, UNKNOWN = 0, 1, 2
STREAMS = (ENCODE, GENERATE)
RETAIN_S = 3600.0  # how long the answer of a request that ran again can be read
TIMEOUT_S = 600.0  # for a request that had no deadline
NOBODY = "quarantine"  # no gateway: its stream does not exist, so nothing is written to it


class Entry(msgspec.Struct, frozen=True):
    """Entry of a quarantine stream."""

    stream: str
    entry_id: str
    reason: str
    attempts: int
    message: Encode | Generate | None  # None: it cannot be read

    @property
    def name(self) -> str:
        return f"{self.stream}/{self.entry_id}"

    @property
    def since(self) -> str:
        """Return the time at which it was quarantined, as its id has it."""
        return _time(int(self.entry_id.partition("-")[0]) / 1000)


class Refused(Exception):
    """Error of an action that an entry does not allow; the message says why."""


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command and return the exit status.

    Raises:
        ConfigError: a flag is wrong.
    """
    flags = parser("millrace quarantine", "Requests that crashed replica after replica.", environ)
    flags.add_argument("action", choices=("list", "show", "retry", "drop"))
    flags.add_argument("entries", nargs="*", metavar="ENTRY", help="as `list` names it")
    flags.add_argument("--all", action="store_true", help="retry or drop every entry")
    flags.add_argument("--body", action="store_true", help="show what the client wrote, too")
    given = flags.parse_args(words)
    if given.action == "list" and (given.entries or given.all):
        raise ConfigError("list takes no entries")
    if given.action == "show" and given.all:
        raise ConfigError("--all: name the entries to be shown")
    if given.action != "list" and bool(given.entries) == given.all:
        raise ConfigError(f"{given.action}: name the entries, or use --all")
    if given.body and given.action != "show":
        raise ConfigError("--body: only with show")
    try:
        return asyncio.run(_run(given.action, given.entries, given.body, given))
    except RedisError as error:
        print(f"millrace quarantine: {no_answer(error)}", file=sys.stderr)
        return UNKNOWN


async def _run(action: str, names: Sequence[str], body: bool, where: Any) -> int:
    redis = connect(where.redis_url)
    blob_redis = connect(where.blob_redis_url) if where.blob_redis_url else redis
    try:
        keys = Keys(where.namespace)
        async with naming_wrong_types(redis, keys, blob_redis):
            return await _act(action, names, body, Quarantine(redis, keys, blob_redis))
    finally:
        for client in {redis, blob_redis}:
            await client.aclose()


async def _act(action: str, names: Sequence[str], body: bool, quarantine: "Quarantine") -> int:
    if action == "list":
        print("\n".join([line(entry) for entry in await quarantine.entries()] or ["the quarantine is empty"]))
        return DONE
    acts: dict[str, Callable[[Entry], Awaitable[str]]] = {"retry": quarantine.retry, "drop": quarantine.drop}
    if action == "show":

        async def show(entry: Entry) -> str:
            return describe(entry, body)

        acts["show"] = show
    return await _each(quarantine, names, acts[action])


async def _each(quarantine: "Quarantine", names: Sequence[str], act: Callable[[Entry], Awaitable[str]]) -> int:
    """Apply `act` to each named entry, or to all; a failure does not stop the others."""
    status = DONE
    for name in names or [entry.name for entry in await quarantine.entries()]:
        try:
            print(await act(await quarantine.entry(name)))
        except Refused as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = NOT_DONE
    return status


class Quarantine:
    """Quarantine streams of one deployment."""

    def __init__(self, redis: Redis, keys: Keys, blob_redis: Redis) -> None:
        self._redis = redis
        self._keys = keys
        self._records = Records(redis, keys)
        self._blobs = Blobs(blob_redis, keys, int(RETAIN_S), 0)

    async def entries(self) -> list[Entry]:
        """Return all entries, the oldest first in each stream."""
        return [
            _entry(stream, *found)
            for stream in STREAMS
            for found in await command(self._redis, "XRANGE", self._keys.quarantine(stream), "-", "+")
        ]

    async def entry(self, name: str) -> Entry:
        """Return the entry of a name.

        Raises:
            Refused: there is none.
        """
        stream, _, entry_id = name.partition("/")
        left, _, right = entry_id.partition("-")
        if stream not in STREAMS or not (left.isdecimal() and right.isdecimal()):
            raise Refused("no such entry; `millrace quarantine list` names them")
        found = await command(self._redis, "XRANGE", self._keys.quarantine(stream), entry_id, entry_id)
        if not found:
            raise Refused("no such entry (any more)")
        return _entry(stream, *found[0])

    async def drop(self, entry: Entry) -> str:
        """Remove an entry and return what was done, in words."""
        await command(self._redis, "XDEL", self._keys.quarantine(entry.stream), entry.entry_id)
        return f"{entry.name}: dropped"

    async def retry(self, entry: Entry) -> str:
        """Send an entry again as a new request, and return where its answer will be, in words.

        Raises:
            Refused: it cannot run again.
        """
        if entry.message is None:
            raise Refused("it cannot be read, so it cannot run again")
        if missing := await self._missing(entry.message):
            raise Refused(f"it cannot run again: {missing}. Its client can send it again")
        needed, names = generation_of(entry.message)
        if needed and needed > await heeded_fields(self._redis, self._keys):
            what = ", ".join(names)
            raise Refused(f"it cannot run again yet: replicas of an older build live, which would leave out {what}")
        again = msgspec.structs.replace(entry.message, request=await self._anew(entry.message.request))
        await self._records.submit(entry.stream, again)
        await self.drop(entry)
        name = f"chatcmpl-{again.request.id}"
        return f"{entry.name}: runs again as {name}; GET /v1/chat/completions/{name} has its answer for an hour"

    async def _missing(self, message: Encode | Generate) -> str | None:
        """Return what the message needs and Redis no longer has, in words, or None."""
        if isinstance(message, Encode):
            for media in message.media:
                if media.blob is not None and await self._blobs.meta(MEDIA, media.blob) is None:
                    return f"the uploaded {media.kind} is gone"
            return None
        for span in message.spans:
            if await self._blobs.meta(EMBEDS, span.key) is None:
                return f"the embeddings of its {span.kind} are gone"
        return None

    async def _anew(self, request: Request) -> Request:
        """Return the request under a new id, so that no token or record of the old one counts for it."""
        shards = await command(self._redis, "HGET", self._keys.shards(), COUNT)
        if shards is None:
            raise Refused("it cannot run again: no postproc has ever run here")
        request_id, now = secrets.token_hex(8), time.time()
        seconds = TIMEOUT_S if request.deadline is None else request.deadline - request.created
        return msgspec.structs.replace(
            request,
            id=request_id,
            gateway=NOBODY,
            shard=zlib.crc32(request_id.encode()) % int(shards),
            created=now,
            deadline=now + seconds,
            retain_s=max(RETAIN_S, request.retain_s),
            form=answer_format.encode(msgspec.structs.replace(answer_format.decode(request.form), n=1, key="")),
        )


def line(entry: Entry) -> str:
    """Write an entry as a line of `list`."""
    what = "unreadable" if entry.message is None else _client_name(entry.message.request)
    return visible(f"{entry.name}  {entry.since}  {what}  {entry.reason}")


def describe(entry: Entry, body: bool) -> str:
    """Write an entry as `show` prints it: without text of the client, unless `body`."""
    fields: dict[str, object] = {"since": entry.since, "reason": entry.reason, "deliveries": entry.attempts}
    if (message := entry.message) is not None:
        fields |= _of_request(message.request) | _of_work(message)
    lines = [visible(text) for text in (entry.name, *(f"  {name:12} {value}" for name, value in fields.items()))]
    if body:
        lines.append(f"  {'body':12} {'unreadable' if message is None else _body(message)}")
    return "\n".join(lines)


def _of_request(request: Request) -> dict[str, object]:
    sampling, output = request.sampling, request.output
    wants = {"tools": output.tools, "logprobs": output.logprobs, "thinking": output.thinking}
    return {
        "request": _client_name(request),
        "created": _time(request.created),
        "deadline": "none" if request.deadline is None else _time(request.deadline),
        "shard": request.shard,
        "sampling": f"seed {sampling.seed}, temperature {sampling.temperature:g}, top_p {sampling.top_p:g}",
        "wants": ", ".join(name for name, wanted in wants.items() if wanted) or "text",
    }


def _of_work(message: Encode | Generate) -> dict[str, object]:
    if isinstance(message, Encode):
        kinds = [media.kind for media in message.media]
        tokens = f"{sum(map(len, message.segments)) // 4} and its media's"
    else:
        kinds = [span.kind for span in message.spans]
        tokens = f"{len(message.prompt) // 4}, at most {message.max_tokens} more"
    return {"tokens": tokens, "media": ", ".join(kinds) or "none"}


def _body(message: Encode | Generate) -> str:
    """Write the message as JSON, with token ids in place of their packed form, and escapes for what a terminal would
    act on."""
    fields = msgspec.to_builtins(message)
    if isinstance(message, Encode):
        fields["segments"] = [unpack_ids(segment) for segment in message.segments]
    else:
        fields["prompt"] = unpack_ids(message.prompt)
    del fields["request"]["form"]
    encoded = msgspec.json.encode(fields).decode()
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in encoded)


def _client_name(request: Request) -> str:
    request_id, _, choice = request.id.partition("-")
    return f"chatcmpl-{request_id}" + (f" choice {choice}" if choice else "")


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "never"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _entry(stream: str, entry_id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    try:
        message = from_entry(fields)
    except ProtocolError:
        message = None
    return Entry(
        stream=stream,
        entry_id=entry_id.decode(),
        reason=fields.get(b"reason", b"").decode(errors="replace"),
        attempts=int(fields.get(b"attempts", b"0")),
        message=message if isinstance(message, Encode | Generate) else None,
    )
