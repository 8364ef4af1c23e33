"""Routes beside those that answer: tokens, models, methods and paths; and what browsers ask before they call."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_stages import Running, Stages, running, until
from machine import PATIENCE_S

from shared.model.tokenizer import Tokenizer
from shared.version import MILLRACE_VERSION

KEY = {"Authorization": "Bearer key-1"}
PAGE = "https://chat.example.org"
CHAT = {"messages": [{"role": "user", "content": "Hi <|end_of_sentence|>"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, api_keys=("key-1",), allowed_origins=(PAGE,)) as started:
        yield started


@pytest.fixture
async def http(server: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, headers=KEY, timeout=PATIENCE_S) as client:
        yield client


async def test_tokens_of_a_text_and_back(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    """A text never becomes a special token, as in prompts; ids are shown by their names."""
    text = "Hä? </s> €"
    reply = (await http.post("/tokenize", json={"model": "m", "prompt": text, "return_token_strs": True})).json()
    assert reply["tokens"] == tokenizer.encode_text(text)
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 2048)
    assert not set(reply["tokens"]) & tokenizer.special_ids
    assert "".join(reply["token_strs"]).startswith("H")
    ids = [tokenizer.control["</s>"], *reply["tokens"]]
    assert (await http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": f"</s>{text}"}


async def test_tokens_of_a_conversation_are_those_of_its_prompt(http: httpx.AsyncClient, stages: Stages) -> None:
    async def tokens(**fields: Any) -> list[int]:
        reply = await http.post("/tokenize/", json={**CHAT, **fields})
        assert reply.json()["token_strs"] is None
        return reply.json()["tokens"]  # type: ignore[no-any-return]

    whole = await tokens()
    bare = await tokens(add_generation_prompt=False)
    assert len(bare) < len(whole)
    assert whole[: len(bare)] == bare
    assert await tokens(tools=[{"function": {"name": "f"}}]) != whole


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
        ("/detokenize", {"tokens": [10_000_000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_what_has_no_tokens_is_refused(http: httpx.AsyncClient, path: str, body: Any, param: str) -> None:
    reply = await http.post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_models_say_what_they_can_and_how_much(http: httpx.AsyncClient) -> None:
    [card] = (await http.get("/v1/models")).json()["data"]
    assert card == (await http.get(f"/v1/models/{card['id']}")).json()
    assert (card["max_model_len"], card["limits"]["images"], card["limits"]["body_bytes"]) == (2048, 100, 128 << 20)
    assert {"chat", "completions", "messages", "responses", "files", "batches"} <= set(card["features"])
    assert (await http.get("/version")).json() == {"version": MILLRACE_VERSION}
    info = (await http.get("/tokenizer_info")).json()
    assert (info["eos_token"], "messages" in info["chat_template"]) == ("</s>", True)


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/health/live", "/", "/openapi.json"])
async def test_head_is_get_without_a_body(http: httpx.AsyncClient, path: str) -> None:
    asked = await http.get(path)
    head = await http.head(path)
    assert (head.status_code, head.content) == (asked.status_code, b"")
    assert head.headers["content-length"] == asked.headers["content-length"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/ping", "GET, HEAD, OPTIONS, POST"),
        ("/v1/models/", "GET, HEAD, OPTIONS"),
        ("/v1/completions/cmpl-0/events", "GET, OPTIONS"),
    ],
)
async def test_a_path_says_its_methods(http: httpx.AsyncClient, path: str, methods: str) -> None:
    options, wrong = await http.options(path), await http.delete(path)
    assert (options.status_code, options.headers["allow"], options.content) == (204, methods, b"")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, methods)
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert (await http.options("/nothing")).status_code == 404


async def test_a_trailing_slash_is_the_same_path_with_the_same_key(server: Running, http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models/")).status_code == 200
    assert (await http.post("/v1/completions/", json={})).json()["error"]["param"] == "prompt"
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as stranger:
        assert (await stranger.get("/health/live//")).status_code == 200
        for path in ("/v1/models/", "/v1/models//", "/tokenize/", "/version"):
            assert (await stranger.get(path)).status_code == 401


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("application/json", 400),
        ("Application/JSON; charset=utf-8", 400),
        ("application/vnd.api+json", 400),
        ("", 400),
        ("text/plain", 415),
        ("text/plain;charset=UTF-8", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
async def test_a_body_is_json_or_says_nothing(http: httpx.AsyncClient, path: str, given: str, status: int) -> None:
    """What a web page may send unasked is refused; clients without the header are served: the 400 is of `{}`."""
    reply = await http.post(path, content=b"{}", headers={"Content-Type": given} if given else {})
    assert reply.status_code == status
    if status == 415:
        assert (reply.json()["error"]["param"], given.split(";")[0] in reply.text) == ("Content-Type", True)


async def test_a_page_says_that_its_body_is_json(http: httpx.AsyncClient) -> None:
    """A browser sends `new Blob([body])` anywhere, without the header and without asking whether it may."""
    blob = await http.post("/v1/chat/completions", content=b"{}", headers={"Origin": "https://evil.example"})
    assert (blob.status_code, blob.json()["error"]["param"]) == (415, "Content-Type")


async def test_without_keys_a_name_of_a_stranger_is_refused_on_this_machine(checkpoint: Path, redis_url: str) -> None:
    """DNS rebinding: a page of evil.example has its name resolve to 127.0.0.1, and is of the same origin as we are."""
    async with running(checkpoint, redis_url) as server, httpx.AsyncClient(base_url=server.url) as browser:
        named = {"Host": f"evil.example:{browser.base_url.port}"}
        for path in ("/v1/models", "/console/state", "/", "/openapi.json"):
            reply = await browser.get(path, headers=named)
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")
        assert (await browser.get("/health/live", headers=named)).status_code == 200
        assert (await browser.get("/v1/models")).status_code == 200


async def test_with_keys_any_name_will_do(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models", headers={"Host": "api.example.com"})).status_code == 200


async def test_a_page_of_an_allowed_origin_may_ask_without_a_key_whether_it_may(server: Running) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as browser:
        allowed = await browser.options("/v1/chat/completions", headers={"Origin": PAGE, **asks})
        refused = await browser.options("/v1/chat/completions", headers={"Origin": "https://evil.example", **asks})
        plain = await browser.get("/v1/models", headers={"Origin": PAGE})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (400, False)
    assert (plain.status_code, plain.headers["access-control-allow-origin"]) == (401, PAGE)
    assert "x-request-id" in plain.headers["access-control-expose-headers"].lower()


async def test_a_stream_to_a_page_is_not_held_back(http: httpx.AsyncClient, stages: Stages) -> None:
    async with http.stream(
        "POST", "/v1/chat/completions", json={**CHAT, "stream": True}, headers={"Origin": PAGE}
    ) as s:
        assert s.headers["access-control-allow-origin"] == PAGE
        lines = s.aiter_lines()
        assert "assistant" in await anext(lines)  # nothing has been answered yet
        await stages.answer(await stages.request(), "x")
        assert [line async for line in lines][-2] == "data: [DONE]"


async def test_without_the_setting_no_origin_is_told_anything(checkpoint: Path, redis_url: str) -> None:
    async with (
        running(checkpoint, redis_url) as server,
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as browser,
    ):
        for reply in (
            await browser.get("/v1/models", headers={"Origin": PAGE}),
            await browser.options("/v1/models", headers={"Origin": PAGE, "Access-Control-Request-Method": "GET"}),
        ):
            assert not [name for name in reply.headers if name.startswith("access-control")]


async def test_a_client_that_leaves_within_its_body_is_no_error_of_ours(server: Running) -> None:
    for path in ("/tokenize", "/v1/chat/completions", "/v1/messages/count_tokens"):
        _, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer key-1\r\ncontent-length: 100\r\n\r\n{{"
        writer.write(head.encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        labels = {"method": "POST", "path": path, "status": "499"}
        await until(lambda told=labels: server.registry.get_sample_value("millrace_http_requests_total", told) == 1)
