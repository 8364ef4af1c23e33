"""Request headers that concern the answer: its time limit, key, event ids and trace."""

import hashlib
import math
import re
from collections.abc import Mapping

import msgspec

from services.gateway.inflight.request import StreamPosition
from services.gateway.request.schemas import digest_body
from shared.errors import invalid

TIMEOUT = "x-request-timeout"
KEY = "idempotency-key"
EVENT_IDS = "x-event-ids"
LAST_EVENT = "last-event-id"
MAX_KEY_CHARS = 255

_KEY = re.compile(rf"[\x20-\x7e]{{1,{MAX_KEY_CHARS}}}")
_POSITION = r"\d{1,15}(-\d{1,15}-\d{1,9})?"
_POSITIONS = re.compile(rf"{_POSITION}(\.{_POSITION})*")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class IdempotencyKey(msgspec.Struct, frozen=True):
    """Digests of an Idempotency-Key and of the body that it was given with."""

    digest: str  # of the key and the owner: equal keys of different owners are different keys
    body_digest: str


def read_timeout(headers: Mapping[str, str], max_s: float) -> float:
    """Return the seconds that the answer may take: the client's number, at most `max_s`.

    Raises:
        RequestError: 400, not a number of seconds.
    """
    given = headers.get(TIMEOUT)
    if given is None:
        return max_s
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise invalid("The header X-Request-Timeout must be a number of seconds above 0.", "X-Request-Timeout")
    return min(seconds, max_s)


def read_event_ids(headers: Mapping[str, str]) -> bool:
    """Return whether the events of a stream shall have ids: as the client says, else if it gives an Idempotency-Key.

    Raises:
        RequestError: 400, neither true nor false.
    """
    given = headers.get(EVENT_IDS)
    if given is None:
        return KEY in headers
    if given not in ("true", "false"):
        raise invalid(f"The header X-Event-IDs must be true or false, not {given!r:.50}.", "X-Event-IDs")
    return given == "true"


def read_idempotency_key(headers: Mapping[str, str], owner: str, body: bytes) -> IdempotencyKey | None:
    """Return the client's Idempotency-Key, if it gave one; `body` must be JSON and an object.

    Raises:
        RequestError: 400, empty, too long, or not printable ASCII.
    """
    given = headers.get(KEY)
    if given is None:
        return None
    if not _KEY.fullmatch(given):
        text = f"The header Idempotency-Key must have 1 to {MAX_KEY_CHARS} printable ASCII characters."
        raise invalid(text, "Idempotency-Key")
    return IdempotencyKey(key_digest(owner, given), digest_body(body))


def key_digest(owner: str, key: str) -> str:
    """Return the name under which an Idempotency-Key of an owner is kept."""
    return hashlib.sha256(f"{owner}\n{key}".encode()).hexdigest()


def read_last_event_id(headers: Mapping[str, str], n: int) -> list[StreamPosition] | None:
    """Return the client's position in each choice; None if it wants the stream from the beginning.

    Raises:
        RequestError: 400, not the id of an event of a stream of `n` choices.
    """
    given = headers.get(LAST_EVENT)
    if not given:  # a browser that has seen no event sends an empty one
        return None
    positions = [_parse_position(one) for one in given.split(".")] if _POSITIONS.fullmatch(given) else []
    if len(positions) != n:
        raise invalid("The header Last-Event-ID is not the id of an event of this stream.", "Last-Event-ID")
    return positions


def read_traceparent(headers: Mapping[str, str]) -> str | None:
    """Return the W3C traceparent, if there is a well-formed one."""
    given = headers.get("traceparent", "")
    return given if _TRACEPARENT.fullmatch(given) else None


def _parse_position(given: str) -> StreamPosition:
    return StreamPosition(*map(int, given.split("-")))
