"""Memory of a request: it is given back when the request ends, and does not wait for the garbage collector."""

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest
from asking import BAD_IMAGE, BROKEN, HI, LOOK, ask
from gateway_stages import Running, Stages, until
from machine import PATIENCE_S
from released import held, without_collector
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from services.gateway.http.context import RequestContext
from services.gateway.http.form import FormReader
from services.gateway.inflight.request import Choice, OpenRequest
from services.gateway.request.parsed import Draft, ParsedRequest
from shared.errors import RequestError
from shared.messages import Delta, Failed

CHAT = "/v1/chat/completions"
KINDS = (OpenRequest, Choice, RequestContext, RequestResponseCycle, ParsedRequest, Draft, FormReader, RequestError)

Way = Callable[[Running, Stages], Coroutine[Any, Any, None]]


async def post(server: Running, path: str, status: int, **content: Any) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        assert (await client.post(path, **content)).status_code == status


async def whole(server: Running, stages: Stages) -> None:
    asked = ask(server)
    request = await stages.request()
    assert held(*KINDS) >= {"OpenRequest", "Choice", "RequestContext", "RequestResponseCycle"}
    await stages.answer(request, "x")
    await asked


async def stream(server: Running, stages: Stages) -> None:
    asked = ask(server, stream=True, n=2)
    for work in await stages.take(2):
        await stages.answer(work.request, "x", "y")
    assert [chunk async for chunk in await asked]


async def failed_behind_media(server: Running, stages: Stages) -> None:
    asked = ask(server, LOOK, stream=True)
    request = await stages.request()
    await stages.tell(request, Failed(request.id, BAD_IMAGE))
    with contextlib.suppress(Exception):
        await asked


async def failed(server: Running, stages: Stages) -> None:
    asked = ask(server)
    request = await stages.request()
    await stages.say(request, Delta(request.id, 1, failure=BROKEN))
    with contextlib.suppress(Exception):
        await asked


async def client_left(server: Running, stages: Stages) -> None:
    asked = ask(server)
    await stages.request()
    asked.cancel()


async def refused(server: Running, _stages: Stages) -> None:
    await post(server, CHAT, 400, json={"model": "demo-model", "messages": HI, "max_tokens": -2})


async def refused_grammar(server: Running, _stages: Stages) -> None:
    grammar = {"structured_outputs": {"regex": "(" * 50}}
    await post(server, CHAT, 400, json={"model": "demo-model", "messages": HI, **grammar})


async def unknown_path(server: Running, _stages: Stages) -> None:
    await post(server, "/v1/nothing", 404, content=b"m" * 50_000)


async def background(server: Running, stages: Stages) -> None:
    await post(server, "/v1/responses", 200, json={"model": "demo-model", "input": "Hi", "background": True})
    await stages.answer(await stages.request(), "x")


async def form(server: Running, _stages: Stages) -> None:
    await post(server, "/v1/files", 400, data={"purpose": "other"}, files={"file": b"m" * 50_000})


WAYS = (whole, stream, failed, failed_behind_media, client_left, refused, refused_grammar, unknown_path)


@pytest.mark.parametrize("way", [*WAYS, background, form], ids=lambda way: way.__name__)
async def test_what_a_request_holds_is_given_back_when_it_ends(server: Running, stages: Stages, way: Way) -> None:
    with without_collector():
        await way(server, stages)
        await server.client.close()  # a connection has its latest request until it ends
        await until(lambda: not held(*KINDS))
