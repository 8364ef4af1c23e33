"""What a request has generated so far, wherever it was generated: its journal and the tail of its tokens stream."""

import asyncio
from collections.abc import Iterable, Sequence

import msgspec
from redis.asyncio import Redis

from shared.errors import ProtocolError
from shared.keys import Keys
from shared.log import logger
from shared.messages import Begin, Request, TokenRun, Tokens
from shared.records import Records
from shared.streams import LogReader

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


async def recover(redis: Redis, keys: Keys, records: Records, requests: Sequence[Request]) -> dict[str, History]:
    """The histories of requests that someone has begun before, by id; each shard's tail is read once.

    The tail is read before the journals: postproc trims tokens only after it has journaled them, so what the one no
    longer has is in the other. A record that is gone by then means that the request ended meanwhile.
    """
    if not requests:
        return {}
    said = await _tails(redis, keys, requests)
    journals = await asyncio.gather(*(records.read_journal(request.id) for request in requests))
    alive = await records.get([request.id for request in requests])
    histories = {}
    for request, journal in zip(requests, journals, strict=True):
        record = alive.get(request.id)
        journaled = 0 if record is None or record.begin is None else record.begin.epoch
        history = fold(journal, said[request.id], journaled)
        histories[request.id] = history if record is not None else History(history.tokens, ended=True)
    return histories


def _sort(message: Tokens, said: dict[str, list[Begin | TokenRun]]) -> None:
    """Append what a message says of the requests in `said` to what was said before."""
    parts: tuple[Begin | TokenRun, ...] = (*message.begins, *message.runs)
    for part in parts:
        if part.request_id in said:
            said[part.request_id].append(part)


async def _tails(redis: Redis, keys: Keys, requests: Sequence[Request]) -> dict[str, list[Begin | TokenRun]]:
    said: dict[str, list[Begin | TokenRun]] = {request.id: [] for request in requests}
    reader = LogReader(redis, {keys.tokens(request.shard): "0" for request in requests})
    while True:
        try:
            entries = await reader.read(PAGE, 0)
        except ProtocolError as error:
            _log.warning("unreadable entry in a tokens stream; its tokens are drawn again", extra={"error": str(error)})
            continue
        if not entries:
            return said
        for _, _, message in entries:
            if isinstance(message, Tokens):
                _sort(message, said)
