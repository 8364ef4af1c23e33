"""Batches of tenants: their allowance, and the limits of their keys while lines run."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_files import answering, chat_line, create, ended, jsonl, lines_of, until_status
from gateway_stages import Running, Stages, running, until
from machine import PATIENCE_S

from services.gateway.tenants.key_file import written_digest

LINES = jsonl(*map(chat_line, "abc"))


def write(path: Path, **tenants: dict[str, Any]) -> None:
    entries = [{"name": name, "hashes": [written_digest(f"key-of-{name}")], **rest} for name, rest in tenants.items()]
    path.write_text(json.dumps({"keys": entries}))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    write(path, alice={"limits": {"batch_lines": 4}}, bob={"limits": {"concurrent_requests": 1}}, carl={})
    return path


@pytest.fixture
async def server(checkpoint: Path, redis_url: str, key_file: Path) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, api_keys_file=str(key_file), lease_ms=1500) as made:
        yield made


def of(server: Running, name: str) -> Running:
    """The server as a tenant calls it."""
    made = Running(server.gateway, server.url, server.registry, server.client.with_options(api_key=f"key-of-{name}"))
    return made


async def test_a_key_with_two_hashes_has_one_share(
    checkpoint: Path, redis_url: str, stages: Stages, key_file: Path
) -> None:
    """Half of the budget of files, whichever key is used; the second reads what the first has made, and goes on."""
    hashes = [written_digest("old"), written_digest("new")]
    write(key_file, alice={"hashes": hashes}, bob={})
    content = b"x" * 3000
    async with running(checkpoint, redis_url, api_keys_file=str(key_file), files_budget_bytes=16_000) as server:
        old, new, bob = (server.client.with_options(api_key=key) for key in ("old", "new", "key-of-bob"))
        file = await old.files.create(file=("in", content), purpose="batch")
        with pytest.raises(openai.APIStatusError) as refused:
            await new.files.create(file=("in", content * 2), purpose="batch")
        assert refused.value.code == "files_budget_exceeded"
        await bob.files.create(file=("in", content * 2), purpose="batch")
        assert (await new.files.content(file.id)).content == content
        await new.files.delete(file.id)
        await server.gateway._batches.drain()
        batch = await create(Running(server.gateway, server.url, server.registry, old), LINES)
        write(key_file, alice={"hashes": hashes[1:]})
        await until(lambda: server.gateway._keyring.find("old") is None)
        server.gateway._batches._draining = False
        async with answering(stages):
            after = Running(server.gateway, server.url, server.registry, new)
            batch = await ended(after, batch.id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 3, "lines of a batch whose first key is gone"


async def test_the_allowance_of_lines(server: Running, stages: Stages) -> None:
    alice = of(server, "alice")
    first = await create(alice, LINES)
    with pytest.raises(openai.RateLimitError) as refused:
        await create(alice, LINES)
    assert "4 lines of batches" in refused.value.message
    bob = await create(of(server, "carl"), LINES)
    async with answering(stages):
        await ended(alice, first.id)
        await ended(of(server, "carl"), bob.id)
        assert (await ended(alice, (await create(alice, LINES)).id)).status == "completed"


async def test_a_limit_of_requests_at_a_time_slows_a_batch_down(server: Running, stages: Stages) -> None:
    bob = of(server, "bob")
    batch = await create(bob, LINES)
    for done in range(3):
        [work] = await stages.take()
        assert work.request.share is not None
        assert (work.request.share.name, work.request.share.priority) == ("bob", 3)
        await stages.answer(work.request, "yes")
        await until(lambda done=done: bob.metric('millrace_batch_lines_total{outcome="completed"}') == done + 1)
    batch = await ended(bob, batch.id)
    assert len(await lines_of(bob, batch.output_file_id)) == 3


async def test_lines_of_a_key_that_is_gone_are_refused(server: Running, stages: Stages, key_file: Path) -> None:
    carl = of(server, "carl")
    await server.gateway._batches.drain()
    batch = await create(carl, LINES)
    write(key_file, bob={})
    async with asyncio.timeout(PATIENCE_S):
        while server.gateway._keyring.find("key-of-carl") is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    server.gateway._batches._draining = False
    await until(lambda: server.metric('millrace_batch_lines_total{outcome="failed"}') == 3)
    write(key_file, bob={}, carl={})
    async with asyncio.timeout(PATIENCE_S):
        while server.gateway._keyring.find("key-of-carl") is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    batch = await until_status(carl, batch.id, "completed")
    statuses = {line["response"]["status_code"] for line in (await lines_of(carl, batch.error_file_id)).values()}
    assert statuses == {401}
