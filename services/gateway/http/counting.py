"""Route that counts the tokens of a prompt, and answers nothing.

Text is counted here. Images and videos take as many tokens as their sizes and frames say, which only the encoder reads:
such a request is submitted like any other, and cancelled when the encoder has accepted its media and said the count.
"""

import time
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Send

from services.gateway.errors import LOST
from services.gateway.http.answer import write_json
from services.gateway.http.context import RequestContext, context_of
from services.gateway.http.handler import RequestHandler, Session
from services.gateway.http.patience import ClientPatience
from services.gateway.inflight.headers import read_timeout
from services.gateway.inflight.work_messages import RequestMetadata
from services.gateway.request.parsed import Draft
from services.gateway.request.statement import Statement
from shared.errors import RequestError


class TokenCounter(msgspec.Struct, frozen=True):
    """Handler of the route."""

    handler: RequestHandler
    path: str
    schema: type[msgspec.Struct]
    read: Callable[[bytes], Statement]
    write: Callable[[int], bytes]
    session: Callable[[], Session] | None = None  # of an API whose requests go on from earlier ones

    async def count(self, request: Request, receive: Receive, send: Send) -> None:
        """Write the number of the prompt's tokens.

        Raises:
            RequestError: the request is refused; nothing was written.
            ClientDisconnect: the client left before it was counted.
        """
        handler = self.handler
        deadline = time.time() + read_timeout(request.headers, handler.request_timeout_s)
        context = context_of(request)
        async with handler.intake.receive(request) as (body, reservation):
            await handler.check(body)
            patience = ClientPatience(receive, deadline)
            read, more = self.read, 0
            if self.session is not None:
                beginning = self.session().begin(body, context.owner, reservation, handler.compute)
                dialect, more = await patience.wait(beginning)
                read = dialect.read
            draft, rendered = await handler.render(
                body, lambda: handler.parser.read(_not_kept(read(body))), patience, more
            )
            context.warnings = draft.stated.warnings
            if not draft.media:  # else it is a request as any other
                await patience.wait(handler.count(context.quota))
            tokens = await handler.compute(len(rendered), lambda: handler.parser.count_text(draft, rendered))
            if draft.media:
                tokens = await self._ask_encoder(draft, rendered, context, patience)
        await write_json(send, self.write(tokens), 200, [])

    async def _ask_encoder(self, draft: Draft, rendered: str, context: RequestContext, patience: ClientPatience) -> int:
        parsed = self.handler.parser.finish(draft, rendered)
        metadata = RequestMetadata(time.time(), patience.deadline, context.owner, None, None, quota=context.quota)
        async with self.handler.open_requests.open(parsed, metadata) as open_request:
            await patience.wait(open_request.accepted.wait())
            if open_request.failure is not None:
                raise RequestError(open_request.failure)
            if open_request.prompt_tokens is None:  # an answer has begun, and the count was lost on its way
                raise RequestError(LOST)
            return open_request.prompt_tokens


def _not_kept(stated: Statement) -> Statement:
    """Return a request of which nothing is left when it has been counted."""
    return msgspec.structs.replace(stated, keep_s=0.0, outlives=False)
