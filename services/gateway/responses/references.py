"""Items of the input that stand for output items of stored responses: `{"type": "item_reference", "id": ...}`.

The AI SDK sends them for all that the model said, unless it is told that nothing is stored.
"""

import re
from typing import Any

import msgspec

from services.gateway.dialects.responses.answered import Answered, output_items
from services.gateway.dialects.responses.tools import namespaces
from services.gateway.http.memory import Reservation
from services.gateway.responses.ends import Ends
from shared.errors import Failure, RequestError, invalid

KIND = "item_reference"
MARK = b'"item_reference"'
MAX_RESPONSES = 256  # that one input may name

# The ids of `answered.py`.
_ID = re.compile(r"(?:rs|msg|fc)_([0-9a-f]{16})(?:-\d{1,9})?")


async def resolve(
    items: list[Any], ends: Ends, owner: str, max_bytes: int, reservation: Reservation
) -> tuple[list[Any], int]:
    """Return the items with the ones that they stand for in place of references, and the bytes of these.

    The reservation grows with them; they have `max_bytes` at most.

    Raises:
        RequestError: 400 naming an id that is of no item, or of none that is kept; 413, too large; 429, no memory.
    """
    responses: dict[str, dict[str, dict[str, Any]]] = {}
    resolved = []
    total = 0
    for index, item in enumerate(items):
        if not (isinstance(item, dict) and item.get("type") == KIND):
            resolved.append(item)
            continue
        name = item.get("id")
        found = _ID.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            raise _unknown(name, index)
        request_id = found[1]
        if request_id not in responses:
            if len(responses) == MAX_RESPONSES:
                raise invalid(f"`input` names items of more than {MAX_RESPONSES} responses.", "input")
            responses[request_id] = await _outputs(request_id, ends, owner)
        if name not in responses[request_id]:
            raise _unknown(name, index)
        whole = responses[request_id][name]
        size = len(msgspec.json.encode(whole))
        total += size
        if total > max_bytes:
            text = f"`input`: the items that it refers to have more than {max_bytes} bytes."
            raise RequestError(Failure(413, text, param="input", code="request_too_large"))
        reservation.grow(size)
        resolved.append(whole)
    return resolved, total


async def _outputs(request_id: str, ends: Ends, owner: str) -> dict[str, dict[str, Any]]:
    """Return the output items of a response by their ids; none if it is not kept or has no answer."""
    head = await ends.store.head(request_id, owner)
    end = None if head is None else await ends.find(request_id, head)
    if head is None or not isinstance(end, Answered) or end.status not in ("completed", "incomplete"):
        return {}
    echoed = msgspec.json.decode(head.form.kept)
    return {item["id"]: item for item in output_items(request_id, end, namespaces(echoed["tools"]))}


def _unknown(name: Any, index: int) -> RequestError:
    field = f"input[{index}].id"
    return invalid(f"`{field}`: the item {name!r:.70} is not kept.", field, "item_not_found")
