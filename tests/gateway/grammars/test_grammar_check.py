"""The check of grammars: what no engine could follow is refused with the reason, whatever it does to the process."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from machine import PATIENCE_S

from services.gateway.grammars.check import GrammarCheck
from services.gateway.grammars.worker import TOO_COMPLEX
from shared.errors import RequestError
from shared.grammar import forms
from shared.grammar.forms import Rule
from shared.messages import Grammar
from shared.workers.process import worker_environ

pytestmark = pytest.mark.system
DEMO = Path(__file__).resolve().parents[3] / "cli" / "demo_checkpoint"


@pytest.fixture
async def grammars() -> AsyncIterator[GrammarCheck]:
    check = GrammarCheck(DEMO, worker_environ(os.environ))
    yield check
    await check.close()


def grammar(rule: Rule) -> Grammar:
    return Grammar(forms.write(rule, thinking=True), "response_format")


def children(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def schema(**keywords: Any) -> Rule:
    return forms.json_schema(keywords)


# Compiled, each would take minutes, all memory, or the process itself.
CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(4000)) + 'r4000: "a"\n'
REFUSED = {
    "a keyword": (schema(uniqueItems=True), 'Unimplemented keys: ["uniqueItems"]'),
    "a keyword deep inside": (schema(properties={"a": {"not": {}}}), 'Unimplemented keys: ["not"]'),
    "an ambiguous oneOf": (schema(oneOf=[{"type": "string"}, {"maxLength": 3}]), "oneOf constraints are not supported"),
    "a look-ahead": (forms.regex("b(?=a)a"), "look-around"),
    "a contradiction": (forms.regex("(?=a)b"), "No text matches"),
    "a pointer to nowhere": (forms.json_schema({"$ref": "#/a"}), "Pointer '/a' does not exist"),
    "a link": (forms.json_schema({"$ref": "http://example.org/a"}), "does not fetch"),
    "nothing allowed": (forms.json_schema(False), "schema is false"),
    "an endless compilation": (schema(type="integer", multipleOf=9999991), TOO_COMPLEX),
    "a stack": (forms.context_free(CHAIN), TOO_COMPLEX),
    "a lexer without end": (forms.regex("(a?){500}a{500}"), "too many expressions"),
    "rules that match in ever more ways": (forms.context_free('start: s\ns: s s s | s s | "a"\n'), TOO_COMPLEX),
    "an explosion": (schema(type="string", pattern="^(([a-z]{1,100}){1,100}){1,100}$"), "too many expressions"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_grammar_is_refused_with_the_reason(grammars: GrammarCheck, name: str) -> None:
    rule, reason = REFUSED[name]
    with pytest.raises(RequestError) as refused:
        await grammars.check(grammar(rule))
    assert refused.value.failure.status == 400
    assert refused.value.failure.param == "response_format"
    assert reason in refused.value.failure.message
    assert len(refused.value.failure.message) < 600


async def test_the_part_that_has_no_grammar_is_named(grammars: GrammarCheck) -> None:
    fine, bad = (
        Grammar(forms.write(rule, thinking=False), path)
        for rule, path in (
            (schema(), "tools[0].function.parameters"),
            (schema(uniqueItems=True), "tools[1].function.parameters"),
        )
    )
    whole = Grammar(bad.text, "tools")
    for parts, param in (((fine, bad), "tools[1].function.parameters"), ((fine,), "tools"), ((), "tools")):
        with pytest.raises(RequestError, match="uniqueItems") as refused:
            await grammars.check(whole, parts)
        assert refused.value.failure.param == param


async def test_others_are_checked_while_one_hangs(grammars: GrammarCheck) -> None:
    hanging = [
        asyncio.create_task(grammars.check(grammar(schema(type="integer", multipleOf=9999991)))) for _ in range(5)
    ]
    await grammars.check(grammar(forms.json_object()))
    await grammars.check(grammar(forms.choice([f"option {n}" for n in range(4096)])))
    assert [type(said) for said in await asyncio.gather(*hanging, return_exceptions=True)] == [RequestError] * 5


async def test_a_check_that_nobody_waits_for_spoils_no_other(grammars: GrammarCheck) -> None:
    await grammars.check(grammar(forms.regex("a+")))
    left = asyncio.create_task(grammars.check(grammar(forms.regex("b+"))))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(RequestError, match="unclosed group"):
        await grammars.check(grammar(forms.regex("(")))
    await grammars.check(grammar(forms.regex("b+")))


async def test_a_process_that_cannot_start_is_no_fault_of_the_client(tmp_path: Path) -> None:
    check = GrammarCheck(tmp_path, worker_environ(os.environ))
    with pytest.raises(RequestError) as failed:
        await check.check(grammar(forms.json_object()))
    assert (failed.value.failure.status, failed.value.failure.code) == (503, "overloaded")
    await check.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("killed", ["worker", "trial"])
async def test_a_process_that_is_killed_in_mid_trial_refuses_no_grammar(grammars: GrammarCheck, killed: str) -> None:
    """Its grammar takes all of its time in a fork of the process; then it is tried in another process."""
    await grammars.check(grammar(forms.regex("a+")))
    [process] = grammars._pool._idle
    worker = process._process.pid
    checking = asyncio.create_task(grammars.check(grammar(schema(type="integer", multipleOf=9999991))))
    async with asyncio.timeout(PATIENCE_S):
        while not (forks := children(worker)):  # noqa: ASYNC110  # the kernel tells nobody
            await asyncio.sleep(0.01)
    os.kill(worker if killed == "worker" else forks[0], signal.SIGKILL)
    with pytest.raises(RequestError, match=TOO_COMPLEX):
        await checking
    [process] = grammars._pool._idle
    assert process._process.pid != worker
