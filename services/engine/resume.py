"""What a request has generated so far, wherever it was generated: its journal and the tail of its tokens stream."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from redis.asyncio import Redis

from services.engine.sequence import asked_prompt, media_tokens
from shared.crash import reach
from shared.errors import ProtocolError
from shared.keys import Keys
from shared.log import logger
from shared.messages import Begin, Generate, Request, TokenRun, Tokens
from shared.records import TOKEN_BYTES, Records
from shared.streams import LogReader, send

PAGE = 500  # entries read at once

_log = logger(__name__)


class History(msgspec.Struct, frozen=True):
    """A request's generated tokens; `ended` if nothing is left to do for it."""

    tokens: tuple[int, ...] = ()
    ended: bool = False


def fold(journal: Sequence[int], said: Iterable[Begin | TokenRun], epoch: int = 0) -> History:
    """Put together what a reader of the stream has accepted: postproc's own rules, so that what a client has seen is
    what the model goes on from.

    Args:
        journal: tokens from index 0 on.
        said: what the stream says of the request, in its order. Tokens the journal has are dropped, and so is
            everything of an epoch older than the newest seen before it. Tokens behind a gap, which only a Redis that
            lost writes can leave, do not count: they are drawn again, and come out the same.
        epoch: the newest whose tokens the journal may hold.
    """
    tokens, newest = list(journal), epoch
    for part in said:
        if part.epoch < newest:
            continue
        newest = part.epoch
        if isinstance(part, Begin) or part.index > len(tokens):
            continue
        tokens.extend(part.tokens[len(tokens) - part.index :])
        if part.finish is not None:
            return History(tuple(tokens), ended=True)
    return History(tuple(tokens))


def announcement(message: Generate, epoch: int, index: int = 0) -> Begin:
    """A Begin of a request that is no sequence yet."""
    image, video = media_tokens(message.spans)
    counts = index, len(message.prompt) // TOKEN_BYTES, 0, image, video
    return Begin(message.request.id, epoch, *counts, asked_prompt(message))


async def recover(
    redis: Redis, keys: Keys, records: Records, claims: Mapping[str, tuple[Generate, int]]
) -> dict[str, History]:
    """The histories of requests that someone has begun before, by id; each shard's tail is read once.

    Args:
        claims: request id -> (the request, the epoch we have claimed it under).

    First a Begin of each goes into the stream: what a former owner, who may only have been paused, writes after it
    counts for nobody. So the tail up to it is all that a client has seen or will see. The tail is read before the
    journals: postproc trims tokens only after it has journaled them, so what the one no longer has is in the other. A
    record that is gone by then, or has a finish, means that the request ended meanwhile.
    """
    if not claims:
        return {}
    requests = [message.request for message, _ in claims.values()]
    await _announce(redis, keys, claims)
    said = await _tails(redis, keys, requests)
    journals = await asyncio.gather(*(records.read_journal(request.id) for request in requests))
    alive = await records.get([request.id for request in requests])
    histories = {}
    for request, journal in zip(requests, journals, strict=True):
        record = alive.get(request.id)
        journaled = 0 if record is None or record.begin is None else record.begin.epoch
        history = fold(journal, said[request.id], journaled)
        ended = record is None or record.finish is not None
        histories[request.id] = History(history.tokens, ended=True) if ended else history
    return histories


async def _announce(redis: Redis, keys: Keys, claims: Mapping[str, tuple[Generate, int]]) -> None:
    begins: dict[int, list[Begin]] = defaultdict(list)
    for message, epoch in claims.values():
        begins[message.request.shard].append(announcement(message, epoch))
    reach("engine.announce.before")
    await asyncio.gather(*(send(redis, keys.tokens(shard), Tokens(tuple(b), ())) for shard, b in begins.items()))
    reach("engine.announce.after")


def _sort(message: Tokens, said: dict[str, list[Begin | TokenRun]]) -> None:
    """Append what a message says of the requests in `said` to what was said before."""
    parts: tuple[Begin | TokenRun, ...] = (*message.begins, *message.runs)
    for part in parts:
        if part.request_id in said:
            said[part.request_id].append(part)


async def _tails(redis: Redis, keys: Keys, requests: Sequence[Request]) -> dict[str, list[Begin | TokenRun]]:
    said: dict[str, list[Begin | TokenRun]] = {request.id: [] for request in requests}
    reader = LogReader(redis, {keys.tokens(request.shard): "0" for request in requests})
    try:
        while True:
            try:
                entries = await reader.read(PAGE, 0)
            except ProtocolError as error:
                _log.warning(
                    "unreadable entry in a tokens stream; its tokens are drawn again", extra={"error": str(error)}
                )
                continue
            if not entries:
                return said
            for _, _, message in entries:
                if isinstance(message, Tokens):
                    _sort(message, said)
    finally:
        await reader.close()
