"""The worker against a real Redis: how tokens become deltas. The test is the engine and the gateway."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from machine import PATIENCE_S
from postproc_stand_in import EOS, Shown, request
from postproc_system import STOP, TOKENS, System, whole

from cli.demo_tokenizer import write_tokenizer
from shared.bus.streams import LogReader
from shared.messages import (
    Cancel,
    Deltas,
    Finish,
    TokenLogprob,
    TokenRun,
    Usage,
)
from shared.model.tokenizer import Tokenizer


async def test_many_requests_share_steps(system: System) -> None:
    requests = [request(f"r{n}", gateway=f"g{n % 2}") for n in range(5)]
    await system.submit(*requests)
    worker = await system.worker()
    await worker.run_turn()
    await system.begin(*(one.id for one in requests))
    for index, token in enumerate(TOKENS):
        await system.step(*(TokenRun(one.id, 1, index, (token,)) for one in requests[index % 2 :]))
        await system.step(*(TokenRun(one.id, 1, index, (token,)) for one in requests[: index % 2]))
        if index % 50 == 0:
            await worker.run_turn()
    await system.step(*(TokenRun(one.id, 1, len(TOKENS), (EOS,), finish=STOP) for one in requests))
    while worker.load()["open"]:
        await worker.run_turn()
    await system.show("g0")
    await system.show("g1")
    assert system.shown == {one.id: whole() for one in requests}
    assert await system.left() == set()
    assert system.counted("p1", "tokens_total") == 5 * (len(TOKENS) + 1)
    assert system.counted("p1", "replayed_tokens_total") == 0
    assert system.counted("p1", "open_requests") == 0


async def test_one_message_a_gateway_and_turn(system: System) -> None:
    await system.submit(request("a", "g1"), request("b", "g1"), request("c", "g2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("a", "b", "c")
    for index in range(20):
        await system.step(*(TokenRun(one, 1, index, (TOKENS[index],)) for one in "abc"))
    await worker.run_turn()
    assert await system.redis.xlen(system.keys.deltas("g1")) == 1
    assert [(d.request_id, d.seq) for d in await system.deltas("g1")] == [("a", 20), ("b", 20)]
    assert [(d.request_id, d.seq) for d in await system.deltas("g2")] == [("c", 20)]


async def test_several_tokens_a_run_and_overlapping_runs(system: System) -> None:
    worker = await system.started(request())
    for first in range(0, len(TOKENS), 5):
        await system.step(TokenRun("r1", 1, max(0, first - 3), tuple(TOKENS[max(0, first - 3) : first + 5])))
        await worker.run_turn()
    await system.finish("r1", len(TOKENS))
    await worker.run_turn()
    assert (await system.show())["r1"] == whole()


async def test_what_comes_twice_or_from_a_former_owner_is_dropped(system: System) -> None:
    worker = await system.started(request())
    await system.generate("r1", 0, 10)
    await system.generate("r1", 5, 10)
    await system.begin("r1", epoch=2, index=8)
    await system.generate("r1", 8, 12, epoch=2)
    await system.step(TokenRun("r1", 1, 12, (TOKENS[0],), finish=Finish("error")))  # not the owner any more
    await system.begin("r1", epoch=1)
    await system.generate("r1", 12, len(TOKENS), epoch=2)
    await system.finish("r1", len(TOKENS), epoch=2)
    await system.finish("r1", len(TOKENS), epoch=2)
    while worker.load()["open"] == 1 or not await system.show():
        await worker.run_turn()
    assert (await system.show())["r1"] == whole()
    assert await system.left() == set()


@pytest.mark.parametrize(
    ("finish", "reason"),
    [(Finish("length"), "length"), (STOP, "stop"), (Finish("stop"), "stop"), (Finish("error"), None)],
)
async def test_after_a_finish_no_key_is_left(system: System, finish: Finish, reason: str | None) -> None:
    worker = await system.started(request())
    await system.generate("r1", 0, 50)
    await worker.run_turn()
    assert await system.left() == {"test:request:r1", "test:journal:r1"}
    await system.finish("r1", 50, finish)
    await worker.run_turn()
    shown = (await system.show())["r1"]
    assert shown.finish_reason == reason
    assert (shown.failure is None) == (reason is not None)
    assert await system.left() == set()
    assert worker.load().items() >= {"open": 0.0, "shards": 1.0}.items()


async def test_a_cancelled_request_ends_without_a_word(system: System) -> None:
    worker = await system.started(request())
    await system.generate("r1", 0, 20)
    await worker.run_turn()
    await system.deltas()
    await system.records.cancel(["r1"])
    await system.finish("r1", 20, Finish("cancelled"))
    await worker.run_turn()
    assert await system.deltas() == []
    assert await system.left() == set()
    assert worker.load()["open"] == 0


async def test_a_stop_string_cancels_and_waits_for_the_engine(system: System) -> None:
    await system.submit(request(stop=("cat",)), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    control = LogReader(system.redis, {system.keys.control(): "0"})
    await system.generate("r1", 0, len(TOKENS) - 5)
    await worker.run_turn()
    shown = (await system.show())["r1"]
    assert (shown.content, shown.finish_reason) == ("A ", "stop")
    assert shown.usage is not None
    assert shown.usage.completion_tokens == shown.seq - 1 < len(TOKENS) - 5
    assert (await system.records.get(["r1"]))["r1"].cancelled
    assert [message for _, _, message in await control.read(10, 0)] == [Cancel(("r1",))]
    assert worker.load()["open"] == 2

    await system.generate("r1", len(TOKENS) - 5, len(TOKENS))
    await worker.run_turn()
    await system.finish("r1", len(TOKENS), Finish("cancelled"))
    await worker.run_turn()
    assert await system.deltas() == []
    assert await control.read(10, 0) == []
    assert await system.left() == {"test:request:r2"}


async def test_log_probabilities_go_through(system: System) -> None:
    worker = await system.started(request(logprobs=True, thinking=False))
    logprobs = tuple(TokenLogprob(-index / 2, ((EOS, -1.0),)) for index in range(4))
    await system.step(TokenRun("r1", 1, 0, tuple(TOKENS[:4]), logprobs))
    await system.step(TokenRun("r1", 1, 2, (*TOKENS[2:4], EOS), (*logprobs[2:], TokenLogprob(-9.0)), STOP))
    await worker.run_turn()
    deltas = await system.deltas()
    assert [shown.logprob for delta in deltas for shown in delta.logprobs] == [0, -0.5, -1, -1.5]
    assert deltas[-1].finish_reason == "stop"


async def test_serve_works_until_cancelled(system: System) -> None:
    await system.submit(request())
    worker = await system.worker()
    task = asyncio.create_task(worker.serve())
    await system.begin("r1")
    await system.generate("r1", 0, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    reader = LogReader(system.redis, {system.keys.deltas("g1"): "0"})
    shown = Shown()
    async with asyncio.timeout(PATIENCE_S):
        while not shown.finish_reason:
            for _, _, message in await reader.read(100, 1000):
                assert isinstance(message, Deltas)
                for delta in message.items:
                    shown.add(delta)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await worker.drain()
    await worker.close()
    assert shown == whole()


async def test_close_ends_turns_even_if_one_goes_on_when_it_is_cancelled(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await system.worker()
    began = asyncio.Event()
    turns: list[int] = []

    async def turn() -> None:
        turns.append(1)
        began.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    monkeypatch.setattr(worker, "run_turn", turn)
    serving = asyncio.create_task(worker.serve())
    async with asyncio.timeout(PATIENCE_S):
        await began.wait()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await worker.close()
    assert turns == [1]


async def test_with_a_tokenizer_as_checkpoints_have_it(system: System, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    text = (
        "Où est la gare ? 你好 😀\n</think>\n\nLet me look.\n"
        '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
    )
    tokens = tokenizer.encode_template(text)
    eos = tokenizer.token_id("</s>")
    assert eos is not None
    worker = await system.started(request(tools=True), vocabulary=tokenizer)
    await system.generate("r1", 0, len(tokens), tokens)
    await system.step(TokenRun("r1", 1, len(tokens), (eos,), finish=Finish("stop", stop_token=eos)))
    await worker.run_turn()
    shown = (await system.show())["r1"]
    assert (shown.reasoning, shown.content) == ("Où est la gare ? 你好 😀", "Let me look.")
    assert shown.functions == [("f", '{"a": "é"}')]
    thought = tokens.index(tokenizer.token_id("</think>")) + 1  # type: ignore[arg-type]
    assert shown.usage == Usage(7, len(tokens) + 1, thought, 3, 2, 1)
    assert shown.finish_reason == "tool_calls"
