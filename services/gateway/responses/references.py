"""Items of the input that stand for output items of stored responses: `{"type": "item_reference", "id": ...}`.

The AI SDK sends them for all that the model said, unless it is told that nothing is stored.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from services.gateway.dialects.responses.answered import Answered, ItemForm, output_items, said_bytes
from services.gateway.dialects.responses.body import MAX_ITEMS
from services.gateway.http.memory import Reservation
from services.gateway.responses.ends import Ends
from shared.errors import Failure, RequestError, invalid

KIND = "item_reference"
MARK = b'"item_reference"'
MAX_RESPONSES = 256  # that one input may name

# The ids of `answered.py`.
_ID = re.compile(r"(?:rs|msg|fc)_([0-9a-f]{16})(?:-\d{1,9})?")


class Input(msgspec.Struct, frozen=True):
    """Items of an input as they were sent, and the ids that some of them are, by index."""

    items: list[Raw]
    names: dict[int, Any]


class _Item(msgspec.Struct, frozen=True):
    type: str = ""
    id: Any = None


_items = msgspec.json.Decoder(Annotated[list[Raw], Meta(max_length=MAX_ITEMS)])
_item = msgspec.json.Decoder(_Item)


def read(given: bytes) -> Input | None:
    """Return the items of an input, JSON; None if it has none, or the dialect will refuse it in its own words."""
    try:
        items = _items.decode(given)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return Input(items, {index: item.id for index, raw in enumerate(items) if (item := _read_item(raw)).type == KIND})


async def resolve(
    given: Input, ends: Ends, owner: str, max_bytes: int, reservation: Reservation
) -> tuple[list[bytes | Raw], int]:
    """Return the items with the ones that they stand for in place of references, and the bytes of these.

    The reservation grows with every response that they are of, before its items are made; of these only those that are
    named are kept, without log-probabilities. All have `max_bytes` at most, each as often as it is named.

    Raises:
        RequestError: 400 naming an id that is of no item, or of none that is kept; 413, too large; 429, no memory.
    """
    total = 0

    def charge(size: int) -> None:
        nonlocal total
        total += size
        if total > max_bytes:
            text = f"`input`: what it refers to has more than {max_bytes} bytes."
            raise RequestError(Failure(413, text, param="input", code="request_too_large"))
        reservation.grow(size)

    kept: dict[str, bytes] = {}
    for request_id, names in _by_response(given.names).items():
        said, form = await _said(request_id, ends, owner)
        charge(said_bytes(said))
        outputs = output_items(request_id, said, form) if said.status in ("completed", "incomplete") else []
        kept |= {item["id"]: msgspec.json.encode(item) for item in outputs if item["id"] in names}
        for name, index in names.items():
            if name not in kept:
                raise _unknown(name, index)
    resolved: list[bytes | Raw] = list(given.items)
    used = set()
    for index, name in given.names.items():
        if name in used:
            charge(len(kept[name]))
        used.add(name)
        resolved[index] = kept[name]
    return resolved, total


def join(items: list[bytes | Raw]) -> bytes:
    """Return items as a list, JSON."""
    return b"[" + b",".join(items) + b"]"


def _read_item(raw: Raw) -> _Item:
    try:
        return _item.decode(raw)
    except msgspec.MsgspecError:
        return _Item()


def _by_response(names: Mapping[int, Any]) -> dict[str, dict[str, int]]:
    """Return ids by the response that they are of, each with the index where it stands first.

    Raises:
        RequestError: 400, one is of no item, or they are of too many responses.
    """
    found: dict[str, dict[str, int]] = {}
    for index, name in names.items():
        match = _ID.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise _unknown(name, index)
        found.setdefault(match[1], {}).setdefault(name, index)
    if len(found) > MAX_RESPONSES:
        raise invalid(f"`input` names items of more than {MAX_RESPONSES} responses.", "input")
    return found


async def _said(request_id: str, ends: Ends, owner: str) -> tuple[Answered, ItemForm]:
    """Return what the model said in a response, and the form of its items; a cancelled one if none is kept."""
    head = await ends.store.head(request_id, owner)
    end = None if head is None else await ends.find_said(request_id, head)
    if head is None or not isinstance(end, Answered):
        return Answered(cancelled=True), ItemForm()
    return end, head.item_form


def _unknown(name: Any, index: int) -> RequestError:
    field = f"input[{index}].id"
    return invalid(f"`{field}`: the item {name!r:.70} is not kept.", field, "item_not_found")
