"""`millrace serve --gateways 2`: two processes take connections from one socket, and either may die."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from machine import PATIENCE_S
from system import System, running

from cli.demo import write_demo

CONNECTIONS = 8  # to a gateway that must take them all, since the other is halted
GATEWAY = "services.gateway"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("gateways")
    write_demo(directory / "demo", dtype="float32")
    kept = {"MILLRACE_RETAIN_S": str(PATIENCE_S)}  # answers, until somebody has come back for them
    with running(["--model", str(directory / "demo"), "--gateways", "2"], directory, kept) as system:
        yield system


@contextmanager
def halted(pid: int) -> Iterator[None]:
    """Halt a process meanwhile, which is for less time than its lease lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def chat(system: System, content: str = "Hello") -> httpx.Response:
    """Ask over a connection of its own."""
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "seed": 1}
    return httpx.post(f"{system.base_url}/v1/chat/completions", json=body, timeout=PATIENCE_S)


def test_each_takes_what_the_other_leaves(system: System) -> None:
    gateways = system.pids(GATEWAY)
    assert len(gateways) == 2
    for pid in gateways:
        with halted(pid):
            assert [system.get("/health")[0] for _ in range(CONNECTIONS)] == [200] * CONNECTIONS
    assert chat(system).status_code == 200


def test_an_answer_begun_at_one_is_read_at_the_other(system: System) -> None:
    one, other = system.pids(GATEWAY)
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "seed": 1}
    answers = []
    for pid in (one, other):
        with halted(pid):
            reply = httpx.post(
                f"{system.base_url}/v1/chat/completions",
                json={**body, "ignore_eos": True},
                headers={"Idempotency-Key": "the same"},
                timeout=PATIENCE_S,
            )
            answers.append(reply.json())
    assert answers[0]["id"] == answers[1]["id"]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_one_that_dies_is_missed_by_nobody_and_started_again(system: System) -> None:
    before, gateways = len(system.log.read_text()), system.pids(GATEWAY)
    system.kill_process(gateways[0], GATEWAY)
    assert [chat(system, f"{i}").status_code for i in range(CONNECTIONS)] == [200] * CONNECTIONS
    system.wait_for("gateway was ended by SIGKILL; starting it again", after=before)
    system.wait_for("millrace: gateway    ready", after=before)
    new = [pid for pid in system.pids(GATEWAY) if pid not in gateways]
    with halted(gateways[1]):
        assert [system.get("/health")[0] for _ in range(CONNECTIONS)] == [200] * CONNECTIONS
    assert len(new) == 1


def test_the_metrics_are_of_both_and_outlive_each(system: System) -> None:
    name = "millrace_requests_ended_total"
    system.wait_for_metric("millrace_open_requests", 0)
    before = system.metric(name)
    for count, pid in enumerate(system.pids(GATEWAY), 1):
        with halted(pid):
            assert chat(system).status_code == 200
            system.wait_for_metric(name, before + count)
    log = len(system.log.read_text())
    system.kill_process(system.pids(GATEWAY)[0], GATEWAY)
    assert system.metric(name) == before + 2
    system.wait_for("millrace: gateway    ready", after=log)  # one that is being started does not end in order
