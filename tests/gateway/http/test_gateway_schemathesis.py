"""Requests that schemathesis makes of our own description: no 500, and no answer that is not described."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from batch_files import answering
from gateway_stages import Running, Stages, running, until
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra test")

checks = pytest.importorskip("schemathesis.specs.openapi.checks")

pytestmark = pytest.mark.slow

EXAMPLES = 6
CHECKS = (checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance)


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, request_timeout_s=0.5, hold_headers_s=0.1, max_n=2) as started:
        yield started


def ask(url: str) -> dict[str, set[int]]:
    """Make requests of every operation; return the statuses of each."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    return {operation.label: examine(operation) for operation in operations}


def examine(operation: Any) -> set[int]:
    """Make requests of one operation; return the statuses of the answers."""
    statuses: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy())
    def ask_once(case: Any) -> None:
        reply = case.call()
        statuses.add(reply.status_code)
        assert reply.status_code != 500, (case.as_curl_command(), reply.text)
        case.validate_response(reply, checks=CHECKS)

    ask_once()
    return statuses


# Requests are made in a thread, beside a gateway whose Redis client draws from `random` where it waits to try again; it
# is hypothesis that then takes a strategy for the one who drew.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
async def test_no_500_and_no_status_that_is_not_described(server: Running, stages: Stages) -> None:
    async with answering(stages):
        seen = await asyncio.to_thread(ask, server.url)
    assert len(seen) > 30
    asked = {label: statuses for label, statuses in seen.items() if label.startswith("POST /v1/")}
    assert set().union(*asked.values()) >= {200, 400, 404}
    assert {status for label in asked if "{" not in label for status in asked[label]} >= {200, 400}
    await until(server.idle)
