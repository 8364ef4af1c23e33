"""Response headers about limits, as OpenAI's clients know them."""

import math
from collections.abc import Mapping, Sequence


def rate_headers(limits: Mapping[str, int], rates: Sequence[int]) -> dict[bytes, bytes]:
    """Return the headers of the limits a minute that there are.

    `rates` are, of requests and then of tokens, what remains and the ms until all of it is there again.
    """
    headers = {}
    for kind, (remaining, reset_ms) in (("requests", rates[:2]), ("tokens", rates[2:])):
        if kind in limits:
            headers[f"x-ratelimit-limit-{kind}"] = str(limits[kind])
            headers[f"x-ratelimit-remaining-{kind}"] = str(remaining)
            headers[f"x-ratelimit-reset-{kind}"] = duration(reset_ms)
    return _encoded(headers)


def retry_headers(retry_ms: int) -> dict[bytes, bytes]:
    """Return the headers that tell a client when to try again."""
    return _encoded({"retry-after": str(max(1, math.ceil(retry_ms / 1000))), "retry-after-ms": str(retry_ms)})


def duration(ms: int) -> str:
    """Write a duration as OpenAI does: 20ms, 1.5s, 6m0s."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    seconds = f"{rest / 1000:g}s"
    return f"{minutes}m{seconds}" if minutes else seconds


def _encoded(headers: Mapping[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in headers.items()}
