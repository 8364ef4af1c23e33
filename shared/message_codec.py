"""Form of messages in Redis: entries of streams, and values of records.

A stream entry has the fields `v` (the version) and `m` (one message, msgpack, tagged with its type). One of `encode` or
`generate` also has `r`, the id of its request, so that it can be answered when `m` cannot be read, and `k`, its place
among those of other tenants, where there are any. A value of a record is msgpack; one of a later version than 1 begins
with a byte that no msgpack begins with, and the version.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from shared.errors import NewerVersionError, ProtocolError
from shared.message_versions import OLDEST, VERSION, WRITES, translate
from shared.messages import Begin, Encode, Finish, Generate, MediaKind, Message, Request, TokenLogprob

# What an entry of `encode` costs its tenant; how large its media are is known only when they have been fetched.
MEDIA_COST: Mapping[MediaKind, int] = {"image": 1, "video": 16}

_LATER = 0xC1  # begins a value of a record of a later version than 1; msgpack never uses it
_NIL = b"\xc0"
# What decoding and translating damaged bytes raises.
_UNREADABLE = (msgspec.MsgspecError, LookupError, TypeError, AttributeError, ValueError)

T = TypeVar("T", bound=msgspec.Struct)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_value_decoders: dict[type[msgspec.Struct], msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (Request, Begin, Finish, TokenLogprob)
}


def to_entry(message: Message) -> dict[bytes, bytes]:
    """Return the fields of a stream entry that carries `message`, in the version that everybody reads."""
    return _to_entry(message, WRITES.number)


def to_entries(messages: Iterable[Message]) -> tuple[bytes, list[dict[bytes, bytes]]]:
    """Return the fields of entries that are written together, all of one version, and that (`v`)."""
    version = WRITES.number  # once: it may fall between two of them
    return b"%d" % version, [_to_entry(message, version) for message in messages]


def _to_entry(message: Message, version: int) -> dict[bytes, bytes]:
    data = _encode(message, version)
    entry = {b"v": b"%d" % version, b"m": data}
    if not isinstance(message, Encode | Generate):
        return entry
    entry[b"r"] = message.request.id.encode()
    if message.request.share is not None:
        entry[b"k"] = message.request.share.place(*_cost(message))
    return entry


def _cost(message: Encode | Generate) -> tuple[int, int]:
    """Return what serving an entry costs its tenant, and the most tokens that its answer has."""
    if isinstance(message, Encode):
        return sum(MEDIA_COST[media.kind] for media in message.media), 0
    return len(message.prompt) // 4, message.max_tokens


def from_entry(fields: Mapping[bytes, bytes]) -> Message:
    """Return the message of a stream entry.

    Raises:
        NewerVersionError: it is of a newer version.
        ProtocolError: it is of a version that is read no more, or is none of these messages.
    """
    version = entry_version(fields)
    data = fields.get(b"m", b"")
    try:
        if version < VERSION:
            data = translate(msgspec.msgpack.decode(data, type=_Tagged).type, data, version, VERSION)
        return _decoder.decode(data)
    except _UNREADABLE as error:
        raise ProtocolError(f"unreadable stream entry: {error}") from error


def entry_version(fields: Mapping[bytes, bytes]) -> int:
    """Return the version of a stream entry.

    Raises:
        NewerVersionError, ProtocolError: this process does not read it.
    """
    given = fields.get(b"v", b"")
    if not given.isdigit() or len(given) > 9 or (version := int(given)) < OLDEST:
        raise ProtocolError(f"stream entry of version {given!r}; this process reads {OLDEST} to {VERSION}")
    if version > VERSION:
        raise NewerVersionError(version)
    return version


def translated_entry(fields: Mapping[bytes, bytes]) -> dict[bytes, bytes] | None:
    """Return a stream entry in the version that everybody reads; None if it is in that version, or an older one.

    Raises:
        ProtocolError: it cannot be read.
    """
    return to_entry(from_entry(fields)) if entry_version(fields) > WRITES.number else None


class _Tagged(msgspec.Struct):
    type: str


def _encode(message: msgspec.Struct, version: int) -> bytes:
    """Return the bytes of a message or a part of one."""
    data = _encoder.encode(message)
    return data if version == VERSION else translate(type(message).__name__, data, VERSION, version)


def to_record_value(value: msgspec.Struct) -> bytes:
    """Return a message, or a part of one, as a value of a record, in the version that everybody reads."""
    version = WRITES.number
    return _marked(version, _encode(value, version))


def from_record_value(kind: type[T], data: bytes) -> T:
    """Return the `kind` (Request, Begin, Finish or TokenLogprob) that `to_record_value` has encoded.

    Raises:
        NewerVersionError: it is of a newer version.
        ProtocolError: it is of a version that is read no more, or is no such value.
    """
    version, packed = _split(data)
    if version > VERSION:
        raise NewerVersionError(version)
    if version < OLDEST:
        raise ProtocolError(f"request record of version {version}; this process reads {OLDEST} to {VERSION}")
    try:
        if version < VERSION:
            packed = translate(kind.__name__, packed, version, VERSION)
        value: T = _value_decoders[kind].decode(packed)
    except _UNREADABLE as error:
        raise ProtocolError(f"unreadable request record: {error}") from error
    return value


def encode_logprob(logprob: TokenLogprob | None) -> bytes:
    """Return an element of a request's list of log-probabilities; None for a token without."""
    return _NIL if logprob is None else to_record_value(logprob)


def decode_logprob(data: bytes) -> TokenLogprob | None:
    """Return what `encode_logprob` has encoded.

    Raises:
        ProtocolError: as `from_record_value`.
    """
    return None if data == _NIL else from_record_value(TokenLogprob, data)


def translated_record_value(kind: str, data: bytes) -> bytes | None:
    """Return a value of a record in the version that everybody reads; None if it is in that version, or an older one.

    `kind` is the name of its type.

    Raises:
        ProtocolError: it cannot be read.
    """
    number, (version, packed) = WRITES.number, _split(data)
    if not number < version <= VERSION:
        return None
    try:
        return _marked(number, translate(kind, packed, version, number))
    except _UNREADABLE as error:
        raise ProtocolError(f"unreadable request record: {error}") from error


def record_version(data: bytes) -> int:
    """Return the version of a value of a record."""
    return _split(data)[0]


def _marked(version: int, data: bytes) -> bytes:
    return data if version == 1 else bytes((_LATER, version)) + data


def _split(data: bytes) -> tuple[int, bytes]:
    """Return (version, bytes) of a value of a record."""
    return (data[1], data[2:]) if len(data) > 1 and data[0] == _LATER else (1, data)
