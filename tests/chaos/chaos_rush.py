"""Clients that connect, ask and are gone, many at once: before the answer begins, or before the question is whole."""

import asyncio
import contextlib
import json
import random
from urllib.parse import urlsplit

AT_ONCE = 60
LONGEST_S = 0.5  # that one stays


async def rush(url: str, rng: random.Random) -> None:
    """Send a rush of them to a gateway, which may die of something else meanwhile."""
    await asyncio.gather(*(_ask_and_drop(url, _question(rng), rng.uniform(0, LONGEST_S)) for _ in range(AT_ONCE)))


def _question(rng: random.Random) -> bytes:
    """Return a request for a long answer; one of five ends in the middle."""
    message = {"role": "user", "content": f"Write {rng.random()} words."}
    body = json.dumps({"model": "chaos", "max_tokens": 200, "stream": rng.random() < 0.7, "messages": [message]})
    fields = f"host: chaos\r\ncontent-type: application/json\r\nx-api-key: key-of-heavy\r\ncontent-length: {len(body)}"
    question = f"POST /v1/chat/completions HTTP/1.1\r\n{fields}\r\n\r\n{body}".encode()
    return question[: rng.randrange(len(question))] if rng.random() < 0.2 else question


async def _ask_and_drop(url: str, question: bytes, stays_s: float) -> None:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
        writer.write(question)
        await asyncio.sleep(stays_s)
        writer.transport.abort()
