"""A batch whose gateway dies: uploaded and read by a client that comes back after a broken connection."""

import asyncio
import json
from typing import Any

import httpx
from chaos_client import Choice, Transcript
from chaos_requests import Ask
from chaos_system import LOOK_S, System

CHAT = "/v1/chat/completions"
LINES = 3
ENDED = ("completed", "failed", "expired", "cancelled")


async def run_batch(system: System, http: httpx.AsyncClient, ask: Ask, expected: Transcript, *, cancel: bool) -> None:
    """Bring a batch to its end, check its results, and delete its files."""
    body = {**ask.body, "model": "chaos"}
    lines = [{"custom_id": str(n), "method": "POST", "url": CHAT, "body": body} for n in range(LINES)]
    content = "\n".join(map(json.dumps, lines)).encode()
    form = {"files": {"file": ("in.jsonl", content)}, "data": {"purpose": "batch"}}
    file = await _ask(system, http, "POST", "/v1/files", **form)
    asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "5m"}
    path = f"/v1/batches/{(await _ask(system, http, 'POST', '/v1/batches', json=asked))['id']}"
    if cancel:
        await system.generating()
        await _ask(system, http, "POST", f"{path}/cancel")
    while (batch := await _ask(system, http, "GET", path))["status"] not in ENDED:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_S)
    assert batch["status"] == ("cancelled" if cancel else "completed"), batch
    if not cancel:
        await _check(system, http, batch["output_file_id"], expected)
    names = [batch[f"{kind}_file_id"] for kind in ("input", "output", "error")]
    for name in filter(None, names):
        await _ask(system, http, "DELETE", f"/v1/files/{name}")
    found = [key async for key in system.redis.scan_iter(match=f"{system.keys.batch('')}*:*", count=1000)]
    assert not found, f"a batch that has ended has {found}"


async def _check(system: System, http: httpx.AsyncClient, name: str, expected: Transcript) -> None:
    answer = await _reach(system, http, "GET", f"/v1/files/{name}/content")
    results = [json.loads(line) for line in answer.text.splitlines()]
    assert sorted(result["custom_id"] for result in results) == [str(n) for n in range(LINES)]
    for result in results:
        got = Transcript([Choice()])
        for choice in result["response"]["body"]["choices"]:
            got.choices[0].add(choice["message"], choice["logprobs"], choice["finish_reason"])
        wrong = got.differs(expected, usage_asked=False)
        assert not wrong, f"line {result['custom_id']}: {wrong}\n{system.tails()}"


async def _ask(system: System, http: httpx.AsyncClient, method: str, path: str, **options: Any) -> dict[str, Any]:
    answer = await _reach(system, http, method, path, **options)
    assert answer.status_code == 200, f"{method} {path}: {answer.text}\n{system.tails()}"
    found: dict[str, Any] = answer.json()
    return found


async def _reach(system: System, http: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
    """Ask again as long as there is no gateway."""
    while True:
        try:
            return await http.request(method, system.of("gateway")[-1].url + path, **options)
        except httpx.TransportError:
            await asyncio.sleep(LOOK_S)
