"""Earlier turns of a conversation, by `previous_response_id`."""

from typing import Any

import msgspec

from services.gateway.dialects.responses.answered import Answered, output_items, said_bytes
from services.gateway.dialects.responses.body import MAX_ITEMS
from services.gateway.dialects.responses.resource import PREFIX
from services.gateway.http.memory import Reservation
from services.gateway.responses.ends import Ends
from services.gateway.responses.store import StoredHead, request_id_of
from shared.errors import Failure, RequestError, invalid

FIELD = "previous_response_id"
MAX_TURNS = 256


class EarlierTurns(msgspec.Struct, frozen=True):
    """Items of the earlier turns, inputs and outputs, and the ids of their requests."""

    items: tuple[dict[str, Any], ...] = ()
    turns: tuple[str, ...] = ()
    size: int = 0  # bytes of JSON


class EarlierTurnsReader(msgspec.Struct, frozen=True):
    """Reader of the turns that came before a response. Reading them renews their lifetime."""

    ends: Ends
    max_bytes: int  # of all items

    async def read(self, name: str, owner: str, reservation: Reservation) -> EarlierTurns:
        """Return the turns up to the response `name`; the reservation grows with them.

        Raises:
            RequestError: 400, one of them is not kept, has not ended, or has no answer; 413, too large; 429, no memory.
        """
        last = request_id_of(name)
        head = await self.ends.store.head(last, owner) if last is not None else None
        if last is None or head is None:
            raise _unknown(name)
        turns = (*head.ancestors, last)
        if len(turns) > MAX_TURNS:
            raise invalid(f"`{FIELD}`: the conversation has {len(turns)} turns; the limit is {MAX_TURNS}.", FIELD)
        items: list[dict[str, Any]] = []
        size = 0
        for turn in turns:
            one = head if turn == last else await self.ends.store.head(turn, owner)
            given = await self.ends.store.items(turn)
            if one is None or given is None:
                raise _unknown(name, "" if turn == last else f", of which {PREFIX}{turn} is an earlier turn,")
            said = await self._said(turn, one)
            more = len(given) + said_bytes(said)
            size += more
            self._check_size(size)
            reservation.grow(more)
            items += [*msgspec.json.decode(given), *output_items(turn, said, one.item_form)]
        if len(items) > MAX_ITEMS:
            raise invalid(f"`{FIELD}`: the conversation has {len(items)} items; the limit is {MAX_ITEMS}.", FIELD)
        return EarlierTurns(tuple(items), turns, size)

    async def _said(self, request_id: str, head: StoredHead) -> Answered:
        end = await self.ends.find_said(request_id, head)
        if not isinstance(end, Answered):
            raise invalid(f"`{FIELD}`: that response has not ended yet.", FIELD, "previous_response_not_completed")
        if end.status not in ("completed", "incomplete"):
            raise invalid(f"`{FIELD}`: that response is {end.status}.", FIELD, "previous_response_not_completed")
        return end

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            text = f"`{FIELD}`: the conversation has more than {self.max_bytes} bytes."
            raise RequestError(Failure(413, text, param=FIELD, code="request_too_large"))


def _unknown(name: str, which: str = "") -> RequestError:
    text = f"`{FIELD}`: the response {name[:64]!r}{which} is not kept."
    return invalid(text, FIELD, "previous_response_not_found")
