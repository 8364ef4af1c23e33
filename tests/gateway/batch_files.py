"""Input files of batches, and stages that answer each of their lines."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from gateway_stages import Running, Stages
from machine import PATIENCE_S
from openai.types import Batch

from shared.messages import Request

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def chat_line(custom_id: str, text: str = "Hi", **fields: Any) -> dict[str, Any]:
    """A request of an input file."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def jsonl(*lines: dict[str, Any]) -> bytes:
    """An input file."""
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


async def upload(server: Running, content: bytes, **fields: Any) -> str:
    """The id of an uploaded file."""
    file = await server.client.files.create(file=("in.jsonl", content), purpose="batch", **fields)
    return file.id


async def create(server: Running, content: bytes, **fields: Any) -> Batch:
    """A batch of an uploaded file."""
    file_id = await upload(server, content)
    asked: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h", **fields}
    return await server.client.batches.create(input_file_id=file_id, **asked)


async def until_status(server: Running, batch_id: str, *statuses: str) -> Batch:
    """A batch once it has one of these statuses."""
    async with asyncio.timeout(PATIENCE_S):
        while (batch := await server.client.batches.retrieve(batch_id)).status not in statuses:
            assert batch.status not in ENDED, batch
            await asyncio.sleep(0.01)
    return batch


async def ended(server: Running, batch_id: str) -> Batch:
    """A batch once it has ended."""
    return await until_status(server, batch_id, *ENDED)


async def lines_of(server: Running, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of an output file by custom id, each of which is there once."""
    if file_id is None:
        return {}
    content = (await server.client.files.content(file_id)).text
    lines = [json.loads(line) for line in content.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


@asynccontextmanager
async def answering(stages: Stages, seen: Callable[[Request], object] = lambda request: None) -> AsyncIterator[None]:
    """Answer every request, in the order in which they come, with one word."""

    async def answer() -> None:
        while True:
            request = await stages.request()
            seen(request)
            await stages.answer(request, "yes")

    async def forever() -> None:
        while True:
            try:
                await answer()
            except TimeoutError:
                continue

    task = asyncio.create_task(forever())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
