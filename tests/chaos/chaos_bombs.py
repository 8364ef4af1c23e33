"""Files that take long to decode, sent to a gateway beside what its clients send."""

import contextlib
from functools import cache

import httpx
from machine import PATIENCE_S
from media_bombs import canvas_gif, scans_jpeg
from system import data_url

REFUSED = (400, 429, 500, 502, 503, 504)  # a 5xx where the gateway or the encoder's Redis is not there


@cache
def bombs() -> list[dict[str, object]]:
    """Return content parts: a video and an image that their headers give away, and two that decode for seconds."""
    gifs, jpegs = (canvas_gif(8000, 3000), canvas_gif(4000, 40)), (scans_jpeg(2000, 2000), scans_jpeg(7000, 80))
    return [*(_part("video", gif, "gif") for gif in gifs), *(_part("image", jpeg, "jpeg") for jpeg in jpegs)]


def _part(kind: str, data: bytes, form: str) -> dict[str, object]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": data_url(data, f"{kind}/{form}")}}


async def drop(url: str, part: dict[str, object]) -> None:
    """Post one, and see it refused or answered; the gateway may die of something else meanwhile."""
    content = [part, {"type": "text", "text": "What is this?"}]
    body = {"model": "chaos", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
    with contextlib.suppress(httpx.TransportError):
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            answer = await client.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code in (200, *REFUSED), answer.text
