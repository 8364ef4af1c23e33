"""What a request says in its headers: how long it may take, under which key it may be repeated, where it goes on."""

import hashlib
import math
import re
from collections.abc import Mapping

import msgspec

from services.gateway.inflight.request import Place
from shared.errors import invalid

TIMEOUT = "x-request-timeout"
KEY = "idempotency-key"
LAST_EVENT = "last-event-id"
MAX_KEY_CHARS = 255

_KEY = re.compile(rf"[\x20-\x7e]{{1,{MAX_KEY_CHARS}}}")
_PLACE = r"\d{1,15}(-\d{1,15}-\d{1,9})?"
_PLACES = re.compile(rf"{_PLACE}(\.{_PLACE})*")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
# They say how the answer is sent, and not what it is.
_OF_THE_SENDING = frozenset({"stream", "stream_options"})


class Key(msgspec.Struct, frozen=True):
    """An Idempotency-Key, and what it was given for."""

    digest: str  # of the key and of whose it is
    body: str  # digest of what is asked for


def timeout(headers: Mapping[str, str], longest: float) -> float:
    """Seconds from now in which the answer must be complete: the client's, and at most the server's.

    Raises:
        RequestError: 400, not a number of seconds.
    """
    given = headers.get(TIMEOUT)
    if given is None:
        return longest
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise invalid("The header X-Request-Timeout must be a number of seconds above 0.", "X-Request-Timeout")
    return min(seconds, longest)


def key(headers: Mapping[str, str], owner: str, body: bytes) -> Key | None:
    """The client's Idempotency-Key, if it gave one; `body` is JSON and an object.

    Raises:
        RequestError: 400, empty, too long, or not plain text.
    """
    given = headers.get(KEY)
    if given is None:
        return None
    if not _KEY.fullmatch(given):
        text = f"The header Idempotency-Key must have 1 to {MAX_KEY_CHARS} printable ASCII characters."
        raise invalid(text, "Idempotency-Key")
    return Key(hashlib.sha256(f"{owner}\n{given}".encode()).hexdigest(), _digest(body))


def last_event(headers: Mapping[str, str], n: int) -> list[Place] | None:
    """How much of each choice the client has; None if it wants all.

    Raises:
        RequestError: 400, no id of an event of a stream of `n` choices.
    """
    given = headers.get(LAST_EVENT)
    if not given:  # a browser that has seen none says so by an empty one
        return None
    places = [_place(one) for one in given.split(".")] if _PLACES.fullmatch(given) else []
    if len(places) != n:
        raise invalid("The header Last-Event-ID is not the id of an event of this stream.", "Last-Event-ID")
    return places


def _place(given: str) -> Place:
    return Place(*map(int, given.split("-")))


def trace(headers: Mapping[str, str]) -> str | None:
    """The W3C traceparent, if it is one."""
    given = headers.get("traceparent", "")
    return given if _TRACEPARENT.fullmatch(given) else None


def _digest(body: bytes) -> str:
    """Of what a body asks for, in whatever order its fields come and however the answer is to be sent."""
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    digest = hashlib.sha256()
    for name in sorted(fields.keys() - _OF_THE_SENDING):
        value = bytes(fields[name])
        digest.update(b"%d %d " % (len(name.encode()), len(value)))
        digest.update(name.encode() + value)
    return digest.hexdigest()
