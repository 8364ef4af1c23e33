"""Rendering in processes: what a template may do to one is its own failure, and everybody else is answered."""

import asyncio
import os
import re
import resource
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from machine import PATIENCE_S

from services.gateway.request.chat import Rendering
from services.gateway.request.template import RawText, TemplateSource
from services.gateway.templates import renderer as module
from services.gateway.templates.renderer import TemplateRenderer
from shared.errors import CheckpointError, Failure, RequestError
from shared.workers.process import WorkerProcess, worker_environ

pytestmark = pytest.mark.system

FINE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# Each hangs, crashes or fills its process, while it is rendered or already while it is compiled.
HARMFUL = {
    "a loop": (LOOPS, "more than 1 s of computing"),
    "a power": ("{{ (messages | length + 6) ** (9 ** 9) }}", "more than 1 s of computing"),
    "a long text": ("{{ 'x' * (messages | length * 10 ** 10) }}", "too much memory"),
    "a long constant": ("{{ 'x' * 10 ** 10 }}", "too much memory"),
    "a surrogate": ("{{ '\\ud800' }}", "lone surrogate"),
    "nested code": ("{{ " + "(" * 20_000 + ")" * 20_000 + " }}", "does not compile|crash"),
}


@asynccontextmanager
async def running(source: str = FINE, max_chars: int = 10_000) -> AsyncIterator[TemplateRenderer]:
    template = TemplateSource("chat_template.jinja", source, {"bos_token": "<s>"})
    renderer = TemplateRenderer(template, max_chars, worker_environ(os.environ))
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield renderer
    finally:
        await renderer.close()


def conversation(content: Any = "Hi", own: str | None = None) -> Rendering:
    return Rendering({"messages": [{"role": "user", "content": content}]}, "mark", own_template=own)


async def failure_of(renderer: TemplateRenderer, rendering: Rendering) -> Failure:
    with pytest.raises(RequestError) as caught:
        await renderer.render(rendering)
    return caught.value.failure


@pytest.fixture(autouse=True)
def a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_S", 1)


async def test_values_arrive_as_they_are() -> None:
    values = {"raw": RawText('{"cut": "of'), "text": "é\u2028", "large": -(10**30), "n": 1.5, "none": None, "yes": True}
    expected = (
        '{"raw": {"cut": "of, "text": "é\u2028", "large": -1' + "0" * 30 + ', "n": 1.5, "none": null, "yes": true}'
    )
    async with running("{{ bos_token }}{{ messages[0].content | tojson }}") as renderer:
        await renderer.start()
        assert await renderer.render(conversation(values)) == f"<s>{expected}"


async def test_refusals_name_the_conversation() -> None:
    async with running("{{ raise_exception('no') if messages[0].content == 'a' else 'x' * 11 }}", 10) as renderer:
        refused = await failure_of(renderer, conversation("a"))
        long = await failure_of(renderer, conversation("b"))
    assert (refused.status, refused.param) == (400, "messages")
    assert (long.status, long.code) == (400, "context_length_exceeded")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not keep the limit of memory")
async def test_a_template_of_a_request_harms_nobody() -> None:
    async with running() as renderer:
        for name, (source, what) in HARMFUL.items():
            failure = await failure_of(renderer, conversation(own=source))
            assert (failure.status, failure.param) == (400, "chat_template"), name
            assert re.search(what, failure.message), name
            assert await renderer.render(conversation(own=FINE)) == "[Hi]", name
            assert await renderer.render(conversation()) == "[Hi]", name


async def test_others_are_rendered_while_templates_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_S", 3600)
    async with running() as renderer:
        await renderer.start()
        hanging = [asyncio.create_task(failure_of(renderer, conversation(own=LOOPS))) for _ in range(2)]
        assert await renderer.render(conversation()) == "[Hi]"
        assert not any(task.done() for task in hanging)
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)


async def test_a_checkpoint_whose_template_hangs_is_named() -> None:
    async with running(f"{{% if messages[0].content == 'Hi' %}}{LOOPS}{{% endif %}}") as renderer:
        await renderer.start()
        failure = await failure_of(renderer, conversation())
        assert (failure.status, failure.param) == (500, None)
        assert "chat_template.jinja takes more than 1 s" in failure.message
        assert await renderer.render(conversation("Bye")) == ""


@pytest.mark.parametrize(("source", "what"), [("{% if", "does not compile"), ("{{ 7 ** (9 ** 9) }}", "more than 1 s")])
async def test_a_start_with_a_template_that_cannot_be_compiled(source: str, what: str) -> None:
    async with running(source) as renderer:
        with pytest.raises(CheckpointError, match=rf"chat_template\.jinja: the chat template .*{what}"):
            await renderer.start()


async def test_a_process_that_was_killed_is_replaced() -> None:
    async with running() as renderer:
        await renderer.start()
        [process] = renderer._trusted._idle
        assert isinstance(process, WorkerProcess)
        os.kill(process._process.pid, signal.SIGKILL)
        assert await renderer.render(conversation()) == "[Hi]"


async def test_idle_processes_that_were_killed_together_cost_no_request() -> None:
    async with running() as renderer:
        await asyncio.gather(*(renderer.render(conversation()) for _ in range(2)))
        idle = list(renderer._trusted._idle)
        assert len(idle) == 2
        for each in idle:
            os.kill(each._process.pid, signal.SIGKILL)
            await each._process.wait()
        assert await renderer.render(conversation()) == "[Hi]"


async def test_a_process_for_which_there_are_no_files_is_no_fault_of_the_template() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with running() as renderer:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            failure = await failure_of(renderer, conversation())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (failure.status, failure.code) == (503, "overloaded")
        assert await renderer.render(conversation()) == "[Hi]"


async def test_processes_do_not_know_our_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_API_KEYS", '["secret"]')
    assert not any("MILLRACE" in name for name in worker_environ(os.environ))
    assert Path(worker_environ(os.environ)["PYTHONPATH"].split(os.pathsep)[-1]).is_absolute()
