"""Stored responses: what each began with, and once it is known how it ended. Blobs with a budget of their own.

    head   written when the request was submitted, before its client knows its id: owner and format
    input  the same: its input items, JSON; read only for the next turn, or to be listed
    end    written by whoever has seen the whole answer: a function of the answer, so that writing it again does no harm

A response without an end runs, or its end is in its record and journal (`services/gateway/inflight/pipeline.py`).
"""

import msgspec

from services.gateway.dialects.responses import answered
from services.gateway.dialects.responses.answered import Answered, ItemForm, item_form
from services.gateway.dialects.responses.resource import PREFIX
from services.gateway.request.answer_format import AnswerFormat
from shared import log
from shared.bus.blobs import Blobs
from shared.errors import Failure, RequestError, unreadable

HEAD, INPUT, END = "head", "input", "end"  # kinds of blobs
ID_CHARS = 16
_HEX = frozenset("0123456789abcdef")

logger = log.logger(__name__)


class StoredHead(msgspec.Struct, frozen=True):
    """Beginning of a response. Fields may be added at the end, with defaults."""

    owner: str
    created: float  # unix seconds
    form: AnswerFormat
    ancestors: tuple[str, ...] = ()  # request ids of the earlier turns, oldest first

    @property
    def item_form(self) -> ItemForm:
        """The form of its output items."""
        return item_form(msgspec.json.decode(self.form.kept))


class ResponseStore:
    """Reader and writer of stored responses, by the id of their request."""

    def __init__(self, blobs: Blobs) -> None:
        """`blobs`: with the lifetime and the budget of responses."""
        self._blobs = blobs

    async def put_head(self, request_id: str, head: StoredHead, items: bytes) -> None:
        """Store the beginning of a response, and its input items (JSON)."""
        await self._blobs.put(INPUT, request_id, items, owner=head.owner)
        await self._blobs.put(HEAD, request_id, msgspec.msgpack.encode(head), head.owner.encode(), head.owner)

    async def head(self, request_id: str, owner: str) -> StoredHead | None:
        """Return the beginning of a response; None if there is none, or it is another owner's.

        Raises:
            RequestError: 500, it cannot be read.
        """
        if await self._blobs.meta(HEAD, request_id) != owner.encode():
            return None
        found = await self._blobs.get(HEAD, request_id)
        try:
            return None if found is None else msgspec.msgpack.decode(found[0], type=StoredHead)
        except msgspec.MsgspecError as error:
            raise RequestError(unreadable("the beginning of the response")) from error

    async def items(self, request_id: str) -> bytes | None:
        """Return the input items of a response as JSON; None if they are not kept any more."""
        found = await self._blobs.get(INPUT, request_id)
        return None if found is None else found[0]

    async def put_end(self, request_id: str, owner: str, end: Answered) -> None:
        """Store the end of a response."""
        await self._blobs.put(END, request_id, answered.encode(end), owner=owner)

    async def end(self, request_id: str, logprobs: bool = True) -> Answered | None:
        """Return the end of a response, with its log-probabilities or without; None if none is stored.

        Raises:
            RequestError: 500, it cannot be read.
        """
        found = await self._blobs.get(END, request_id)
        try:
            decode = answered.decode if logprobs else answered.decode_said
            return None if found is None else decode(found[0])
        except msgspec.MsgspecError as error:
            raise RequestError(unreadable("the answer")) from error

    async def delete(self, request_id: str) -> None:
        """Delete a response."""
        for kind in (HEAD, INPUT, END):
            await self._blobs.delete(kind, [request_id])


def request_id_of(name: str) -> str | None:
    """Return the request's id in the id of a response; None if it is no such id."""
    found = name.removeprefix(PREFIX)
    return found if name.startswith(PREFIX) and len(found) == ID_CHARS and _HEX.issuperset(found) else None


def no_response(name: str) -> RequestError:
    """Return a 404: no such response is kept, or it belongs to another API key."""
    return RequestError(Failure(404, f"Response with id {name[:64]!r} not found.", code="response_not_found"))
