"""Recovery of the tokens that earlier engines generated for a request, from its journal and its tokens stream."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from redis.asyncio import Redis

from services.engine.schedule.sequence import asked_prompt, media_tokens
from shared.bus.keys import Keys
from shared.bus.records import TOKEN_BYTES, Record, Records, UnreadableRecord
from shared.bus.streams import LogReader, send
from shared.crash_points import crash_point
from shared.errors import ProtocolError
from shared.log import logger
from shared.messages import Begin, Generate, Request, TokenRun, Tokens
from shared.token_runs import Verdict, judge_run, known_tokens

PAGE = 500  # entries read at once

_log = logger(__name__)


class History(msgspec.Struct, frozen=True):
    """Generated tokens of a request; `ended` if its answer is complete, `damaged` if they cannot all be read."""

    tokens: tuple[int, ...] = ()
    ended: bool = False
    damaged: bool = False


def fold(journal: Sequence[int], parts: Iterable[Begin | TokenRun], epoch: int = 0) -> History:
    """Return the tokens that postproc has accepted, by its own rule (shared/token_runs.py).

    The model continues from them: they are the tokens that the client has seen.

    Args:
        journal: tokens from index 0 on.
        parts: the request's parts of the tokens stream, in order. Tokens that the journal has are dropped, and so are
            all parts of an epoch older than the newest before them. Tokens behind a gap, which only a Redis that lost
            writes can leave, do not count: they are sampled again, with the same result.
        epoch: the newest epoch whose tokens the journal may hold.
    """
    tokens, newest = list(journal), epoch
    for part in parts:
        if isinstance(part, Begin):
            newest = max(newest, part.epoch)
            continue
        verdict = judge_run(part, newest, len(tokens))
        if verdict is Verdict.STALE:
            continue
        newest = part.epoch
        if verdict is Verdict.GAP:
            continue
        tokens.extend(part.tokens[known_tokens(part, len(tokens)) :])
        if part.finish is not None:
            return History(tuple(tokens), ended=True)
    return History(tuple(tokens))


def announcement(message: Generate, epoch: int, index: int = 0) -> Begin:
    """Return the Begin of a request that is not a sequence yet."""
    image, video = media_tokens(message.spans)
    counts = index, len(message.prompt) // TOKEN_BYTES, 0, image, video
    return Begin(message.request.id, epoch, *counts, asked_prompt(message))


async def recover(
    redis: Redis, keys: Keys, records: Records, claims: Mapping[str, tuple[Generate, int]]
) -> dict[str, History]:
    """Return the histories, by id, of requests that an engine has begun before; each shard's stream is read once.

    Args:
        claims: request id -> (the request, the epoch that this engine raised it to).

    A Begin of each is written first. It fences off former owners, which may only have been paused: no reader accepts
    tokens that they write after it, so the stream up to it has all that a client has seen or will see. The stream is
    read before the journals: postproc trims tokens only after it has journaled them, so tokens missing from the stream
    are in the journal. A record that is gone by then, or has a finish, means that the request has ended.
    """
    if not claims:
        return {}
    requests = [message.request for message, _ in claims.values()]
    await _announce(redis, keys, claims)
    streamed = await _read_streams(redis, keys, requests)
    journals = await asyncio.gather(*(_read_journal(records, request.id) for request in requests))
    alive = await records.get([request.id for request in requests])
    return {
        request.id: _history(alive.get(request.id), journal, streamed[request.id])
        for request, journal in zip(requests, journals, strict=True)
    }


async def _read_journal(records: Records, request_id: str) -> list[int] | None:
    """Return a journal; None if it is damaged."""
    try:
        return await records.read_journal(request_id)
    except ProtocolError as error:
        _log.error("unreadable journal", extra={"request_id": request_id, "error": str(error)})
        return None


def _history(
    record: Record | UnreadableRecord | None, journal: list[int] | None, streamed: Sequence[Begin | TokenRun]
) -> History:
    if isinstance(record, UnreadableRecord) or journal is None:
        return History(damaged=True)
    journaled = 0 if record is None or record.begin is None else record.begin.epoch
    history = fold(journal, streamed, journaled)
    ended = record is None or record.finish is not None
    return History(history.tokens, ended=True) if ended else history


async def _announce(redis: Redis, keys: Keys, claims: Mapping[str, tuple[Generate, int]]) -> None:
    begins: dict[int, list[Begin]] = defaultdict(list)
    for message, epoch in claims.values():
        begins[message.request.shard].append(announcement(message, epoch))
    crash_point("engine.announce.before")
    await asyncio.gather(*(send(redis, keys.tokens(shard), Tokens(tuple(b), ())) for shard, b in begins.items()))
    crash_point("engine.announce.after")


def _append_parts(message: Tokens, found: dict[str, list[Begin | TokenRun]]) -> None:
    """Append the parts of a message that belong to the requests in `found`."""
    parts: tuple[Begin | TokenRun, ...] = (*message.begins, *message.runs)
    for part in parts:
        if part.request_id in found:
            found[part.request_id].append(part)


async def _read_streams(redis: Redis, keys: Keys, requests: Sequence[Request]) -> dict[str, list[Begin | TokenRun]]:
    found: dict[str, list[Begin | TokenRun]] = {request.id: [] for request in requests}
    reader = LogReader(redis, {keys.tokens(request.shard): "0" for request in requests})
    try:
        while True:
            # Tokens in entries that cannot be read, which are skipped, are sampled again.
            entries = await reader.read(PAGE, 0)
            if not entries:
                return found
            for _, _, message in entries:
                if isinstance(message, Tokens):
                    _append_parts(message, found)
    finally:
        await reader.close()
