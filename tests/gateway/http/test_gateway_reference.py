"""The API's reference at /docs: files of the gateway's own, which a browser may run nothing beside."""

import re
from pathlib import Path

import httpx
from gateway_stages import running
from machine import PATIENCE_S

from services.gateway.reference.routes import ASSETS, STATIC


async def test_the_page_is_public_and_the_description_is_not(checkpoint: Path, redis_url: str) -> None:
    async with (
        running(checkpoint, redis_url, api_keys=["sk-one"]) as server,
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        for path in ASSETS:
            reply = await client.get(path)
            assert reply.status_code == 200
            assert "default-src 'self'" in reply.headers["content-security-policy"]
            assert "require-trusted-types-for 'script'" in reply.headers["content-security-policy"]
        assert (await client.get("/openapi.json")).status_code == 401
        described = await client.get("/openapi.json", headers={"Authorization": "Bearer sk-one"})
    assert "/v1/chat/completions" in described.json()["paths"]
    assert "messages" in described.json()["components"]["schemas"]["ChatRequest"]["properties"]


def test_every_file_that_the_page_asks_for_is_served_and_nothing_is_inline_or_foreign() -> None:
    page = (STATIC / "reference.html").read_text()
    asked = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {path for path in asked if path.startswith("/docs/")} == set(ASSETS) - {"/docs"}
    for path in STATIC.iterdir():
        assert not re.search(r"https?://|innerHTML|\son\w+=|<style", path.read_text()), path
    assert re.findall(r"<script[^>]*>", page) == ['<script src="/docs/reference.js" defer>']
