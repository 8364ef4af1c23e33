"""Clients that come back for an answer: its events from where they were, or all of it at once."""

import re

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Send

from services.gateway import terms
from services.gateway.admission import Admission
from services.gateway.answer import Answerer
from services.gateway.desk import Desk
from services.gateway.errors import unknown_request
from services.gateway.pipeline import Known, Pipeline

_NAME = re.compile(r"chatcmpl-([0-9a-f]{16})")


class Returns(msgspec.Struct, frozen=True):
    """What the routes need."""

    admission: Admission
    pipeline: Pipeline
    desk: Desk
    answerer: Answerer

    async def events(self, name: str, request: Request, receive: Receive, send: Send) -> None:
        """The stream of an answer, after the event that the client saw last.

        Raises:
            RequestError: 404, there is no such request; 400, it has no such event.
        """
        with self.admission.slot():
            known = await self._find(name, request)
            shown = terms.last_event(request.headers, known.form.n)
            async with self.desk.rejoin(known, known.form, True, shown) as exchange:
                await self.answerer.respond(exchange, request, receive, send)

    async def answer(self, name: str, request: Request, receive: Receive, send: Send) -> None:
        """The whole answer if it is complete, and otherwise that it is not.

        Raises:
            RequestError: 404, there is no such request.
        """
        with self.admission.slot():
            known = await self._find(name, request)
            if not known.ended:
                await self.answerer.say_unfinished(known, send)
                return
            async with self.desk.rejoin(known, known.form, False) as exchange:
                await self.answerer.respond(exchange, request, receive, send)

    async def _find(self, name: str, request: Request) -> Known:
        match = _NAME.fullmatch(name)
        if match is None:
            raise unknown_request(name)
        return await self.pipeline.find(match[1], request.scope["owner"])
