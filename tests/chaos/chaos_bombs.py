"""Files that take long to decode, sent to a gateway beside what its clients send."""

import contextlib
from functools import cache

import httpx
from chaos_tenants import key_of
from machine import PATIENCE_S
from media_bombs import canvas_gif, scans_jpeg
from system import data_url

REFUSED = (400, 429, 500, 502, 503, 504)  # a 5xx where the gateway or the encoder's Redis is not there


@cache
def bombs() -> list[dict[str, object]]:
    """Return content parts: one that its header gives away, one by its area, and one that decodes for seconds."""
    gif, known, slow = canvas_gif(8000, 3000), scans_jpeg(2000, 2000), scans_jpeg(4000, 80)
    return [
        {"type": "video_url", "video_url": {"url": data_url(gif, "video/gif")}},
        {"type": "image_url", "image_url": {"url": data_url(known, "image/jpeg")}},
        {"type": "image_url", "image_url": {"url": data_url(slow, "image/jpeg")}},
    ]


async def drop(url: str, part: dict[str, object]) -> None:
    """Post one, and see it refused or answered; the gateway may die of something else meanwhile."""
    content = [part, {"type": "text", "text": "What is this?"}]
    body = {"model": "chaos", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
    with contextlib.suppress(httpx.TransportError):
        async with httpx.AsyncClient(timeout=PATIENCE_S, headers=key_of(0)) as client:
            answer = await client.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code in (200, *REFUSED), answer.text
