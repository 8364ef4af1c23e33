"""Fuzzed bodies against the running system: each gets an answer or a clear 4xx, and none a 500, whole or in a stream.

`make test-fuzz` sends 20,000 of another seed.
"""

import asyncio
import json
import os
from typing import Any

import httpx
from fuzz_bodies import body_of
from machine import PATIENCE_S
from system import System

SEED = int(os.environ.get("FUZZ_SEED", "0"))
BODIES = int(os.environ.get("FUZZ_BODIES", "150"))
CONNECTIONS = 8
TIMEOUT_S = 120  # of one request, the server's


def error_of(reply: httpx.Response) -> dict[str, Any] | None:
    """The error in an answer; None if there is none.

    Raises:
        AssertionError: it is neither an answer nor an error as the API has them.
    """
    if reply.headers["content-type"].startswith("text/event-stream"):
        *events, done, end = reply.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        last = json.loads(events[-1].removeprefix("data: "))
        return dict(last["error"], status=last["error"]["code"]) if "error" in last else None
    answer = reply.json()
    if reply.status_code == 200:
        assert answer["choices"]
        return None
    return dict(answer["error"], status=reply.status_code)


def fault_in(reply: httpx.Response) -> str:
    """What is wrong with an answer, or ""."""
    try:
        error = error_of(reply)
    except (AssertionError, ValueError, KeyError, TypeError) as problem:
        return f"{reply.status_code} {reply.text[:500]!r}: {problem!r}"
    if error is None:
        return ""
    clear = isinstance(error["message"], str) and error["message"] and 400 <= error["status"] < 500
    return "" if clear else f"{error}"


async def send(system: System, numbers: "asyncio.Queue[int]", faults: list[str]) -> None:
    url, headers = f"{system.base_url}/v1/chat/completions", {"X-Request-Timeout": str(TIMEOUT_S)}
    async with httpx.AsyncClient(timeout=2 * PATIENCE_S) as client:
        while not numbers.empty():
            number = numbers.get_nowait()
            body = body_of(SEED, number)
            try:
                fault = fault_in(await client.post(url, content=body, headers=headers))
            except httpx.HTTPError as error:
                fault = repr(error)
            if fault:
                faults.append(f"body_of({SEED}, {number}): {fault}\n    {body[:1500]!r}")


async def test_no_body_is_a_500(system: System) -> None:
    numbers: asyncio.Queue[int] = asyncio.Queue()
    for number in range(BODIES):
        numbers.put_nowait(number)
    faults: list[str] = []
    await asyncio.gather(*(send(system, numbers, faults) for _ in range(CONNECTIONS)))
    assert not faults, f"{len(faults)} of {BODIES}\n" + "\n".join(faults[:40])
