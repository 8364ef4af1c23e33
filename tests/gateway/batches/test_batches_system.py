"""Batches of the whole system: gateways that die in the middle, and everything that is started again."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from batch_files import CHAT, ENDED, chat_line, jsonl
from machine import PATIENCE_S
from openai import OpenAI
from openai.types import Batch
from page_examples import check, examples
from system import System, running, started

from cli.demo import write_demo

pytestmark = pytest.mark.system

T = TypeVar("T")

LINES, TOKENS = 12, 40
FEW_AT_A_TIME = {"MILLRACE_BATCH_CONCURRENCY": "3"}  # so that a batch is in the middle for long
INPUT, BATCH, OUTPUT, ERRORS = (
    "file-" + "0" * 23 + "1",
    "batch_" + "0" * 23 + "2",
    "file-" + "0" * 23 + "3",
    "file-" + "0" * 23 + "4",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, in float32: what a request is batched with never changes which token is drawn."""
    directory = tmp_path_factory.mktemp("batches")
    write_demo(directory / "demo", dtype="float32")
    return directory


def arguments(demo: Path) -> list[str]:
    return ["--model", str(demo / "demo"), "--max-model-len", "4096", "--redis-dir", str(demo / "redis")]


@pytest.fixture(scope="module")
def system(demo: Path) -> Iterator[System]:
    """The system of all tests of this file; the last one stops it."""
    with started(arguments(demo), demo, FEW_AT_A_TIME) as system:
        system.wait_until_ready()
        yield system


def client_of(system: System) -> OpenAI:
    return OpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=8, timeout=PATIENCE_S)


def long_lines() -> list[dict[str, Any]]:
    """Requests that are in the middle of it whenever something dies."""
    return [chat_line(str(n), f"Tell {n}", max_tokens=TOKENS, ignore_eos=True, seed=n) for n in range(LINES)]


def begin(client: OpenAI) -> Batch:
    file = client.files.create(file=("in.jsonl", jsonl(*long_lines())), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="1h")


def until(client: OpenAI, batch_id: str, results: int) -> Batch:
    """A batch once so many lines have a result, or it has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        batch = client.batches.retrieve(batch_id)
        assert batch.request_counts is not None
        if batch.status in ENDED or (batch.status == "in_progress" and batch.request_counts.completed >= results):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def contents(client: OpenAI, batch: Batch) -> dict[str, str]:
    """The texts of a completed batch by custom id, each of which is there once."""
    assert batch.output_file_id is not None
    lines = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    messages = {line["custom_id"]: line["response"]["body"]["choices"][0]["message"] for line in lines}
    assert len(messages) == len(lines)
    return {
        name: (message["reasoning_content"] or "") + (message["content"] or "") for name, message in messages.items()
    }


@pytest.fixture(scope="module")
def whole(system: System) -> dict[str, str]:
    """The answers of a batch that nothing disturbs."""
    with client_of(system) as client:
        batch = until(client, begin(client).id, LINES + 1)
        assert batch.status == "completed", batch
        return contents(client, batch)


def in_time(disturb: Callable[[], T | None]) -> T:
    """What comes of disturbing a batch; None: it had ended by then, since this process stood still. Then another is."""
    deadline = time.monotonic() + PATIENCE_S
    while (disturbed := disturb()) is None:
        assert time.monotonic() < deadline
    return disturbed


def test_a_killed_gateway_loses_no_line_and_runs_none_twice(system: System, whole: dict[str, str]) -> None:
    def kill_twice() -> tuple[Batch, float] | None:
        before = system.metric("millrace_generation_tokens_total")
        batch = begin(client)
        for results in (1, 3):
            if until(client, batch.id, results).status != "in_progress":
                return None
            system.kill_child("services.gateway")
            system.wait_until_ready()
        return batch, before

    with client_of(system) as client:
        batch, before = in_time(kill_twice)
        batch = until(client, batch.id, LINES + 1)
        assert batch.status == "completed", batch
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": LINES, "completed": LINES, "failed": 0}
        assert contents(client, batch) == whole
        assert system.metric("millrace_generation_tokens_total") - before == LINES * TOKENS


def test_the_pages_examples_are_answered_as_it_says(system: System) -> None:
    names: dict[str, str] = {}

    def real(text: str) -> str:
        for shown, name in names.items():
            text = text.replace(shown, name)
        return text

    with httpx.Client(base_url=system.base_url, timeout=PATIENCE_S) as http, client_of(system) as client:
        for method, path, body, status, answer in examples("batches.md"):
            if path == "/v1/files":
                form: dict[str, Any] = {"files": {"file": ("in.jsonl", jsonl(*body))}, "data": {"purpose": "batch"}}
            else:
                form = {"content": real(json.dumps(body))} if body else {}
            if path == f"/v1/batches/{BATCH}":
                batch = until(client, names[BATCH], 2)
                names |= {OUTPUT: str(batch.output_file_id), ERRORS: str(batch.error_file_id)}
            reply = http.request(method, real(path), **form)
            assert reply.status_code == status, (method, path, reply.text)
            check(json.loads(real(json.dumps(answer))), reply.json(), f"{method} {path}")
            names.setdefault(INPUT if path == "/v1/files" else BATCH, reply.json()["id"])


def test_a_batch_survives_a_restart_of_everything(demo: Path, system: System, whole: dict[str, str]) -> None:
    """The last test: it stops the system of the others."""

    def begin_one() -> Batch | None:
        batch = begin(client)
        return batch if until(client, batch.id, 1).status == "in_progress" else None

    with client_of(system) as client:
        batch = in_time(begin_one)
    system.stop()
    with running(arguments(demo), demo, FEW_AT_A_TIME) as again, client_of(again) as client:
        batch = until(client, batch.id, LINES + 1)
        assert batch.status == "completed", batch
        assert contents(client, batch) == whole
