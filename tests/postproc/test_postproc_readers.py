"""Answers that are read at several gateways, from the middle, or after their end."""

import msgspec
import pytest
from postproc_stand_in import EOS, Shown, request
from postproc_system import STOP, TOKENS, System, whole

from shared.messages import (
    Begin,
    Finish,
    PromptLogprobs,
    TokenLogprob,
    TokenRun,
    pack_ids,
)


async def test_who_comes_back_gets_what_it_missed_and_then_the_rest(system: System) -> None:
    worker = await system.started(request())
    await system.generate("r1", 0, 20)
    await worker.run_turn()
    seen = (await system.show())["r1"]
    await system.generate("r1", 20, 30)
    await worker.run_turn()
    await system.deltas()  # sent to a gateway that has died
    await system.attach("r1", "g2", seen.seq)
    await system.generate("r1", 30, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    await worker.run_turn()
    assert (await system.show("g2"))["r1"] == whole()
    assert await system.left() == set()


async def test_an_answer_is_read_at_several_gateways_at_once(system: System) -> None:
    first = await system.started(request())
    await system.generate("r1", 0, 20)
    await first.run_turn()
    await system.attach("r1", "g2", 0)
    await system.generate("r1", 20, 40)
    await first.run_turn()
    await first.run_turn()  # nothing comes, so all is journaled and the stream is empty
    await system.die("p1")
    second = await system.worker("p2")
    await second.run_turn()
    await system.attach("r1", "g3", 0)
    await system.generate("r1", 40, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    await second.run_turn()
    for gateway in ("g1", "g2", "g3"):
        system.shown.clear()
        assert (await system.show(gateway))["r1"] == whole()


async def test_a_gateway_that_has_a_gap_gets_all_behind_it_at_once(system: System) -> None:
    await system.submit(request(), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    for start in (0, 10, 20):
        await system.generate("r1", start, start + 10)
        await system.generate("r2", start, start + 10)
        await worker.run_turn()
    first, _, third = [delta for delta in await system.deltas() if delta.request_id == "r1"]
    assert (first.start, third.start > first.seq) == (0, True)
    await system.attach("r1", "g1", first.seq)
    await system.attach("r1", "g1", first.seq)  # asked twice
    await worker.run_turn()
    shown = Shown()
    for delta in (first, third, *await system.deltas()):
        shown.take(delta)
    await system.generate("r1", 30, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    await worker.run_turn()
    for delta in await system.deltas():
        assert delta.failure is None
        shown.take(delta)
    assert shown == whole()


async def test_where_deltas_go_outlives_the_worker(system: System) -> None:
    first = await system.started(request())
    await system.generate("r1", 0, 40)
    await first.run_turn()
    await system.attach("r1", "g2", 0)
    await first.run_turn()
    await first.run_turn()  # nothing comes, so all is journaled and the stream is empty
    assert await system.redis.xlen(system.keys.tokens(0)) == 0
    assert await system.records.read_journal("r1") == TOKENS[:40]
    await system.die("p1")
    second = await system.worker("p2")
    await second.run_turn()
    await system.generate("r1", 40, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    while not (await system.show("g2")).get("r1", Shown()).done:
        await second.run_turn()
    assert system.shown["r1"] == whole()


async def test_who_comes_back_to_a_request_that_waits_gets_it_from_the_beginning(system: System) -> None:
    await system.submit(request())
    worker = await system.worker()
    await worker.run_turn()
    await system.attach("r1", "g2", 0)
    await worker.run_turn()
    assert worker.load()["open"] == 0
    await system.begin("r1")
    await system.generate("r1", 0, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    await worker.run_turn()
    for gateway in ("g1", "g2"):
        system.shown.clear()
        assert (await system.show(gateway))["r1"] == whole()


async def test_a_finished_answer_is_kept_and_told_again_to_whoever_asks(system: System) -> None:
    await system.submit(request(retain_s=60.0), request("r2", stop=("on; 你",), retain_s=60.0))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    for one in ("r1", "r2"):
        await system.generate(one, 0, len(TOKENS))
    await worker.run_turn()
    await system.finish("r1", len(TOKENS))
    await system.finish("r2", len(TOKENS), Finish("cancelled"))  # for us: it had a stop string
    await worker.run_turn()
    first = dict(await system.show())
    assert worker.load()["open"] == 0
    assert await system.records.read_journal("r1") == TOKENS
    assert {one: record.finish for one, record in (await system.records.get(["r1", "r2"])).items()} == {
        "r1": STOP,
        "r2": Finish("stop"),
    }
    for key in await system.left():
        assert 0 < await system.redis.ttl(key) <= 60

    await system.step(TokenRun("r1", 1, 3, (EOS,)))  # what comes of it now is nothing
    for one in ("r1", "r2"):
        await system.attach(one, "g2", 0)
        await system.attach(one, "g3", first[one].seq - 1)
        await system.attach(one, "g4", first[one].seq)
    await worker.run_turn()
    for gateway, start in (("g2", 0), ("g3", None), ("g4", None)):
        deltas = {delta.request_id: delta for delta in await system.deltas(gateway)}
        for one in ("r1", "r2"):
            delta = deltas[one]
            assert (delta.finish_reason, delta.usage, delta.seq) == ("stop", first[one].usage, first[one].seq)
            assert (delta.content == first[one].content) == (start == 0)
    assert await system.deltas("g1") == []
    assert worker.load()["open"] == 0


async def test_log_probabilities_and_token_ids_are_kept_for_who_asked_for_them(system: System) -> None:
    asked = {"logprobs": True, "return_token_ids": True, "thinking": False}
    await system.submit(request(retain_s=60.0, **asked))  # type: ignore[arg-type]
    first = await system.worker("p1")
    await first.run_turn()
    await system.begin("r1")
    logprobs = tuple(TokenLogprob(-index / 2, ((EOS, -1.0),)) for index in range(41))
    await system.step(TokenRun("r1", 1, 0, tuple(TOKENS[:20]), logprobs[:20]))
    await first.run_turn()
    await first.run_turn()
    await system.die("p1")
    second = await system.worker("p2")
    await second.run_turn()
    await system.step(TokenRun("r1", 1, 20, (*TOKENS[20:40], EOS), logprobs[20:], STOP))
    await second.run_turn()
    shown = (await system.show())["r1"]
    assert [one.logprob for one in shown.logprobs] == [-index / 2 for index in range(40)]  # type: ignore[attr-defined]
    assert shown.token_ids == [*TOKENS[:40], EOS]
    await system.attach("r1", "g2", 0)
    await second.run_turn()
    [delta] = await system.deltas("g2")
    assert (list(delta.logprobs), list(delta.token_ids)) == (shown.logprobs, shown.token_ids)


async def test_the_prompt_comes_with_what_starts_an_answer_whoever_reads_it(system: System) -> None:
    """The engine says it with its Begin; it is kept with the journal, so that a new owner knows it too."""
    prompt = pack_ids([5, 9, 9, 9, 6])
    await system.submit(request(retain_s=60.0, thinking=False, return_token_ids=True))
    first = await system.worker("p1")
    await first.run_turn()
    await system.step(begins=[Begin("r1", 1, 0, 5, 0, 3, 0, prompt)])
    await system.step(TokenRun("r1", 1, 0, tuple(TOKENS[:20])))
    await first.run_turn()
    await first.run_turn()  # nothing comes, so all is journaled, and the stream is empty
    await system.die("p1")
    second = await system.worker("p2")
    await second.run_turn()
    await system.step(begins=[Begin("r1", 2, 20, 5, 5, 3, 0, prompt)])
    await system.step(TokenRun("r1", 2, 20, tuple(TOKENS[20:40]), None, Finish("stop")))
    await second.run_turn()
    shown = await system.deltas("g1")
    assert [(delta.start, delta.prompt) for delta in shown] == [(0, prompt), (20, b"")]
    for after, expected in ((0, prompt), (20, b"")):
        await system.attach("r1", "g2", after)
        await second.run_turn()
        [delta] = await system.deltas("g2")
        assert (delta.start, delta.prompt, delta.token_ids) == (after, expected, tuple(TOKENS[after:40]))


async def test_scores_of_a_prompt_and_of_a_stop_token_outlive_postproc(system: System) -> None:
    """Both are in no journal of tokens: the record has them. Engines that take over say the scores again, or not."""
    scores = PromptLogprobs(0, b"\0" * 16, b"", b"\1" * 16)
    begin = Begin("r1", 1, 0, 5, 0, 0, 0, pack_ids([1, 2, 3, 4, 5]))
    asked = request(retain_s=60.0, thinking=False, return_token_ids=True, logprobs=True, complete_logprobs=True)
    await system.submit(asked)
    first = await system.worker("p1")
    await system.step(begins=[begin])
    await first.run_turn()
    await system.step(begins=[msgspec.structs.replace(begin, epoch=2)])
    await system.step(begins=[msgspec.structs.replace(begin, epoch=2, prompt_logprobs=scores)])
    await first.run_turn()
    await first.run_turn()  # nothing comes, so all is in the record, and the stream is empty
    await system.die("p1")
    second = await system.worker("p2")
    await second.run_turn()
    last = TokenRun(
        "r1", 2, 0, (TOKENS[0], EOS), (TokenLogprob(-1.0), TokenLogprob(-0.5)), Finish("stop", stop_token=EOS)
    )
    await system.step(last)
    await second.run_turn()
    [shown] = await system.deltas("g1")
    assert (shown.start, shown.prompt_logprobs) == (0, scores)
    assert [(one.token, one.logprob) for one in shown.logprobs][1:] == [("</s>", -0.5)]
    await system.attach("r1", "g2", 0)
    await second.run_turn()
    [again] = await system.deltas("g2")
    assert (again.prompt_logprobs, again.logprobs) == (scores, shown.logprobs)


@pytest.mark.parametrize("failed", [True, False])
async def test_what_was_cancelled_or_failed_is_not_kept(system: System, failed: bool) -> None:
    worker = await system.started(request(retain_s=60.0))
    await system.generate("r1", 0, 20)
    await system.finish("r1", 20, Finish("error" if failed else "cancelled"))
    await worker.run_turn()
    assert await system.left() == set()
    await system.attach("r1", "g2", 0)
    await worker.run_turn()
    [delta] = await system.deltas("g2")
    assert delta.failure is not None
    assert (delta.failure.status, delta.failure.code, delta.seq) == (404, "request_not_found", 1)


async def test_who_came_back_learns_that_the_request_was_cancelled(system: System) -> None:
    worker = await system.started(request())
    await system.generate("r1", 0, 20)
    await system.attach("r1", "g2", 0)
    await worker.run_turn()
    await system.deltas("g2")
    await system.finish("r1", 20, Finish("cancelled"))
    await worker.run_turn()
    [delta] = await system.deltas("g2")
    assert delta.failure is not None
    assert delta.failure.code == "request_not_found"


async def test_what_ends_in_the_same_turn_is_told_to_who_comes_back_in_it(system: System) -> None:
    await system.submit(*(request(one) for one in ("good", "failed", "cancelled", "gap")))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("good", "failed", "cancelled", "gap")
    for one in ("good", "failed", "cancelled", "gap"):
        await system.generate(one, 0, 30)
    await system.generate("gap", 31, 32)
    await system.attach("gap", "g2", 0)
    for one, finish in (("good", Finish("length")), ("failed", Finish("error")), ("cancelled", Finish("cancelled"))):
        await system.finish(one, 30, finish)
        await system.attach(one, "g2", 0)
    await worker.run_turn()
    told = {delta.request_id: delta for delta in await system.deltas("g2")}
    assert told["good"].finish_reason == "length"
    assert {one: delta.failure.status for one, delta in told.items() if delta.failure} == {
        "failed": 500,
        "cancelled": 404,
        "gap": 500,
    }
    assert told["gap"].reasoning + told["gap"].content == told["good"].reasoning + told["good"].content != ""


async def test_a_gateway_that_is_gone_leaves_nothing_behind(system: System) -> None:
    await system.submit(request())
    worker = await system.worker()
    await worker.run_turn()
    await system.redis.delete(system.keys.deltas("g1"))
    await system.begin("r1")
    await system.generate("r1", 0, 20)
    await system.finish("r1", 20)
    await worker.run_turn()
    assert not await system.redis.exists(system.keys.deltas("g1"))
    assert await system.left() == set()
