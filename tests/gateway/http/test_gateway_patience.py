"""Waits before a request is submitted end with its deadline, and when its client leaves."""

import asyncio
import logging

import httpx
import pytest
from gateway_stages import Running, until
from machine import PATIENCE_S

from services.gateway.request.chat import Rendering

BODY = {"model": "demo-model", "messages": [{"role": "user", "content": "Hi"}]}


class HangingTemplates:
    """Stand-in for processes all of which are busy, with the number of callers that wait for one."""

    def __init__(self) -> None:
        self.waiting = 0

    async def render(self, _rendering: Rendering) -> str:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        return ""


@pytest.fixture
def templates(server: Running, monkeypatch: pytest.MonkeyPatch) -> HangingTemplates:
    hanging = HangingTemplates()
    monkeypatch.setattr(server.gateway._templates, "render", hanging.render)
    return hanging


async def test_at_its_deadline_a_request_stops_waiting_for_a_template(
    server: Running, templates: HangingTemplates
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        answer = await client.post("/v1/chat/completions", json=BODY, headers={"X-Request-Timeout": "0.1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert templates.waiting == 0
    assert server.idle()


async def test_a_request_whose_client_has_left_stops_waiting_for_a_template(
    server: Running, templates: HangingTemplates, caplog: pytest.LogCaptureFixture
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
        await until(lambda: templates.waiting == 1)
        asking.cancel()
        await until(server.idle)
    assert templates.waiting == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
