"""Routes that tell clients of the tokenizer: tokens of a text or a conversation, the text of tokens, special tokens."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.dialects.prompt_logprobs import TokenTexts
from services.gateway.http.answer import json_response
from services.gateway.http.context import context_of
from services.gateway.http.handler import RequestHandler
from services.gateway.http.reads import reads
from services.gateway.http.structure import check_structure
from services.gateway.request.statement import Statement
from services.gateway.request.template import TemplateSource
from services.gateway.request.tokens import TokenizeRequest, decode_detokenize, decode_tokenize
from services.gateway.request.validate import check_prompt_ids
from shared.errors import invalid


class TokenRoutes(msgspec.Struct, frozen=True):
    """Handlers of the routes."""

    requests: RequestHandler  # for its parser, its processes and its limits
    texts: TokenTexts
    template: TemplateSource

    async def tokenize(self, body: bytes) -> dict[str, Any]:
        """Return vLLM's answer to POST /tokenize.

        Raises:
            RequestError: 4xx naming the field.
        """
        parser, compute = self.requests.parser, self.requests.compute
        asked = await compute(len(body), lambda: decode_tokenize(body))
        parser.names.resolve(asked.model)
        if isinstance(asked, TokenizeRequest):
            tokens = await compute(len(body), lambda: parser.tokenizer.encode_text(asked.prompt))
        else:
            stated = Statement(asked)
            draft = await compute(len(body), lambda: parser.read(stated))
            if draft.media:
                raise invalid("`messages`: tokens of images and videos are counted where they are decoded.", "messages")
            rendered = await self.requests.templates.render(draft.rendering)
            prompt = await compute(len(rendered), lambda: parser.chat.tokenise(draft.rendering, rendered, []))
            [tokens] = prompt.segments
        strings = [self.texts.text_of([token]) for token in tokens] if asked.return_token_strs else None
        counts = {"count": len(tokens), "max_model_len": parser.max_model_len}
        return {**counts, "tokens": tokens, "token_strs": strings}

    async def detokenize(self, body: bytes) -> dict[str, Any]:
        """Return vLLM's answer to POST /detokenize. Special tokens are shown by their names.

        Raises:
            RequestError: 4xx naming the field.
        """

        def text() -> str:
            asked = decode_detokenize(body)
            self.requests.parser.names.resolve(asked.model)
            check_prompt_ids(asked.tokens, self.requests.parser.tokenizer, "tokens")
            return self.texts.text_of(asked.tokens)

        return {"prompt": await self.requests.compute(len(body), text)}

    def info(self) -> dict[str, Any]:
        """Return what GET /tokenizer_info says: special tokens by their role, and the chat template."""
        return {**self.template.tokens, "chat_template": self.template.source}

    async def answer(self, request: Request, handle: Callable[[bytes], Awaitable[dict[str, Any]]]) -> Response:
        """Read a body, within the limits of every request, and answer it.

        Raises:
            RequestError: it is refused.
        """
        limits = self.requests
        async with limits.intake.receive(request) as (body, _):
            await limits.compute(len(body), lambda: check_structure(body, limits.max_text_bytes))
            await limits.count(context_of(request).quota)
            return json_response(await handle(body))


def add_token_routes(app: FastAPI, routes: TokenRoutes) -> None:
    """Add the routes."""

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await routes.answer(request, routes.tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await routes.answer(request, routes.detokenize)

    @reads(app, "/tokenizer_info")
    async def tokenizer_info() -> Response:
        return json_response(routes.info())
