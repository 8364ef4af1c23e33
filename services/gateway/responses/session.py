"""One request of POST /v1/responses: earlier turns before it, and a stored response behind it."""

import time

import msgspec
from starlette.types import Message, Receive, Send

from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.responses.answered import Answered
from services.gateway.dialects.responses.events import replay
from services.gateway.dialects.responses.resource import Head, resource, unanswered
from services.gateway.dialects.responses.responses import NAME, ResponsesDialect, collected, head_of
from services.gateway.http.answer import STREAM_HEADERS, AnswerWriter, write_json
from services.gateway.http.context import RequestContext
from services.gateway.http.handler import Compute
from services.gateway.http.memory import Reservation
from services.gateway.inflight.request import OpenRequest
from services.gateway.request.surrogates import replace_lone_surrogates
from services.gateway.responses import references
from services.gateway.responses.ends import Ends, end_of
from services.gateway.responses.store import StoredHead
from services.gateway.responses.turns import EarlierTurns, EarlierTurnsReader
from shared.errors import RequestError


class _Asked(msgspec.Struct, frozen=True):
    """Part of a body that is needed around its translation."""

    input: msgspec.Raw = msgspec.Raw(b'""')
    previous_response_id: str | None = None


_asked = msgspec.json.Decoder(_Asked)


class ResponseSession:
    """Reads what a request continues, and stores what becomes of it."""

    def __init__(self, dialect: ResponsesDialect, writer: AnswerWriter, ends: Ends, turns: EarlierTurnsReader) -> None:
        self._dialect = dialect
        self._writer = writer
        self._ends = ends
        self._turns = turns
        self._input = b'""'
        self._earlier = EarlierTurns()
        self._end: Answered | None = None  # once it is known
        self._is_kept = False

    async def begin(
        self, body: bytes, owner: str, reservation: Reservation, compute: Compute
    ) -> tuple[ResponsesDialect, int]:
        """Return the dialect for a body, and the bytes of the earlier turns.

        Raises:
            RequestError: 4xx, those turns cannot be had.
        """
        try:
            asked = await compute(len(body), lambda: _read(body))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._dialect, 0  # which refuses it in its own words
        self._input = given = bytes(asked.input)
        dialect, more = self._dialect, 0
        if references.MARK in given:
            found = await compute(len(given), lambda: references.read(given))
            if found is not None and found.names:
                limit = self._turns.max_bytes
                items, more = await references.resolve(found, self._ends, owner, limit, reservation)
                self._input = await compute(len(given) + more, lambda: references.join(items))
                dialect = msgspec.structs.replace(dialect, resolved=self._input)
        if asked.previous_response_id is not None:
            self._earlier = await self._turns.read(asked.previous_response_id, owner, reservation)
        return msgspec.structs.replace(dialect, history=self._earlier.items), self._earlier.size + more

    async def opened(self, open_request: OpenRequest) -> None:
        """Store the beginning of a response, before its client knows its id.

        Raises:
            RedisError: it cannot be stored.
        """
        given, self._input = self._input, b'""'
        earlier, self._earlier = self._earlier, EarlierTurns()
        if _is_stored(open_request):
            form = open_request.answer_format
            head = StoredHead(form.owner, open_request.created, form, earlier.turns)
            await self._ends.store.put_head(open_request.id, head, _items(given))

    async def respond(
        self,
        open_request: OpenRequest,
        context: RequestContext,
        receive: Receive,
        send: Send,
        *,
        event_ids: bool = False,
    ) -> None:
        """Write the answer, and store its end before the client has all of it."""
        if open_request.answer_format.outlives and not open_request.stream:
            await self._answer_at_once(open_request, send)
            return
        if open_request.rejoined and (end := await self._ends.store.end(open_request.id)) is not None:
            await self.write_end(
                head_of(open_request), open_request.answer_format.logprobs, end, send, open_request.stream
            )
            return
        if _is_stored(open_request):
            send = self._storing(open_request, send)
            context = msgspec.structs.replace(context, write=self._storing(open_request, context.write))
        dialect = msgspec.structs.replace(self._dialect, ended=self._note)
        writer = msgspec.structs.replace(self._writer, dialects={NAME: dialect})
        await writer.respond(open_request, context, receive, send, event_ids=event_ids)
        if _is_stored(open_request) and not self._is_kept and open_request.failure is None:
            await self._ends.keep_if_abandoned(open_request)

    async def write_end(self, head: Head, logprobs: bool, end: Answered, send: Send, stream: bool) -> None:
        """Write a response that has ended, as its events behind those that the reader has, or as a whole."""
        if not stream:
            await write_json(send, msgspec.json.encode(resource(head, end)), 200, [])
            return
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await send({"type": "http.response.body", "body": replay(head, logprobs, end, self._dialect.after)})

    def _note(self, end: Answered) -> None:
        self._end = end

    def _storing(self, open_request: OpenRequest, send: Send) -> Send:
        """Return a `send` that stores the end before the last bytes of the response."""

        async def storing(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await self._keep(open_request)
            await send(message)

        return storing

    async def _keep(self, open_request: OpenRequest) -> None:
        end = end_of(open_request.failure) or self._end
        if end is not None and not self._is_kept:
            self._is_kept = True
            await self._ends.keep(open_request.id, open_request.answer_format.owner, end)

    async def _answer_at_once(self, open_request: OpenRequest, send: Send) -> None:
        """Write the response as it is now. Then stay for its end, so that a failure's reason is kept, too.

        Whatever happens to this process, the answer can be derived later; only the reason of a failure would be lost.
        """
        await write_json(send, await self._present(open_request), 200, [])
        choice = CollectedChoice()
        while not open_request.done:
            for _, delta in await open_request.queue.next_deltas():
                choice.add(delta)
        if open_request.failure is None:
            self._end = _collected(choice, open_request)
        await self._keep(open_request)

    async def _present(self, open_request: OpenRequest) -> bytes:
        """Return the response as it is now."""
        head = head_of(open_request)
        if not open_request.rejoined:
            return msgspec.json.encode(unanswered(head, "queued"))
        form = open_request.answer_format
        found = await self._ends.find(open_request.id, StoredHead(form.owner, open_request.created, form))
        if isinstance(found, Answered):
            return msgspec.json.encode(resource(head, found))
        return self._dialect.unfinished(found, "")


def _read(body: bytes) -> _Asked:
    return _asked.decode(replace_lone_surrogates(body))


def _collected(choice: CollectedChoice, open_request: OpenRequest) -> Answered:
    try:
        return collected(choice, open_request, int(time.time()))
    except RequestError as error:
        return Answered(failure=error.failure)


def _is_stored(open_request: OpenRequest) -> bool:
    stored: bool = head_of(open_request).echo["store"]
    return stored


def _items(given: bytes) -> bytes:
    """Return the input of a body as a list of items, JSON."""
    if given[:1] == b"[":
        return given
    return b'[{"type":"message","role":"user","content":%b}]' % given
