"""The worker against a real Redis. The test is the engine, which writes steps, and the gateway, which reads deltas."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from machine import PATIENCE_S
from postproc_stand_in import EOS, Shown, StandIn, cut, every_byte, request
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cli.demo_tokenizer import write_tokenizer
from services.postproc.__main__ import compose
from services.postproc.owned_shards import SERVICE
from services.postproc.settings import PostprocSettings
from services.postproc.text.answer import Answer, Parsers
from services.postproc.text.detokenize import TokenBytes, Vocabulary
from services.postproc.worker import Worker
from shared.bus import retry as patience
from shared.bus.client import command
from shared.bus.keys import GENERATE, Keys
from shared.bus.leases import Fence, Lease
from shared.bus.records import TOKEN_BYTES, Records
from shared.bus.streams import LogReader, send
from shared.message_versions import VERSION
from shared.messages import (
    Attach,
    Begin,
    Cancel,
    Delta,
    Deltas,
    Finish,
    Generate,
    PromptLogprobs,
    Request,
    TokenLogprob,
    TokenRun,
    Tokens,
    Usage,
    pack_ids,
)
from shared.model.tokenizer import Tokenizer

TEXT = "The café, “two” 😀.\n\nHm.\n</think>\n\nA cat. " + "And so on, and on; 你好。\n" * 12
PIECES = cut(TEXT, every_byte(TEXT)[::2])
WORDS = StandIn([piece for piece in PIECES if isinstance(piece, bytes)])
TOKENS = WORDS.tokens(PIECES)
STOP = Finish("stop", stop_token=EOS)


class System:
    """Everything around the workers."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis = redis
        self.keys = keys
        self.records = Records(redis, keys)
        self.leases: dict[str, Lease] = {}
        self.metrics: dict[str, CollectorRegistry] = {}
        self._gateways: dict[str, LogReader] = {}
        self.shown: dict[str, Shown] = {}

    async def worker(
        self, name: str = "p1", vocabulary: TokenBytes = WORDS, clock: Any = None, **options: Any
    ) -> Worker:
        """A worker with a lease; it owns its shards after its first turn."""
        defaults: dict[str, Any] = {"journal_every": 8, "trim_every": 16, "lease_ms": 60, "read_count": 1000}
        settings = PostprocSettings(redis_url="", model="", namespace="test", name=name, **(defaults | options))
        self.metrics[name] = CollectorRegistry()
        self.leases[name] = Lease(self.redis, self.keys, SERVICE, name, ttl_ms=60_000)
        await self.leases[name].renew("ready")
        more = {"clock": clock} if clock else {}
        worker = compose(settings, self.redis, Vocabulary(vocabulary), self.metrics[name], **more)
        await worker.startup()
        return worker

    async def die(self, name: str) -> None:
        """Leave what a crash leaves after a while: an expired lease."""
        await self.leases[name].release()

    def counted(self, name: str, metric: str) -> float:
        value = self.metrics[name].get_sample_value(f"millrace_postproc_{metric}")
        assert value is not None
        return value

    async def listen(self, gateway: str) -> None:
        """A gateway makes its stream before anything is sent to it."""
        key = self.keys.deltas(gateway)
        if not await self.redis.exists(key):
            await command(self.redis, "XGROUP", "CREATE", key, "nobody", "0", "MKSTREAM")

    async def submit(self, *requests: Request) -> None:
        for one in requests:
            await self.listen(one.gateway)
            await self.records.submit(GENERATE, Generate(one, pack_ids([1]), max_tokens=1000))

    async def step(self, *runs: TokenRun, begins: Sequence[Begin] = (), shard: int = 0) -> None:
        await send(self.redis, self.keys.tokens(shard), Tokens(tuple(begins), runs))

    async def begin(self, *request_ids: str, epoch: int = 1, index: int = 0) -> None:
        await self.step(begins=[Begin(request_id, epoch, index, 7, 3, 2, 1) for request_id in request_ids])

    async def generate(
        self, request_id: str, first: int, end: int, tokens: Sequence[int] = TOKENS, epoch: int = 1
    ) -> None:
        """Tokens [first, end), one a step."""
        for index in range(first, end):
            await self.step(TokenRun(request_id, epoch, index, (tokens[index],)))

    async def finish(self, request_id: str, index: int, finish: Finish = STOP, epoch: int = 1) -> None:
        tokens = (EOS,) if finish.stop_token is not None else ()
        await self.step(TokenRun(request_id, epoch, index, tokens, finish=finish))

    async def deltas(self, gateway: str = "g1") -> list[Delta]:
        """Return the deltas for a gateway since the last call."""
        reader = self._gateways.setdefault(gateway, LogReader(self.redis, {self.keys.deltas(gateway): "0"}))
        found: list[Delta] = []
        while entries := await reader.read(1000, 0):
            for _, _, message in entries:
                assert isinstance(message, Deltas)
                found += message.items
        return found

    async def show(self, gateway: str = "g1") -> dict[str, Shown]:
        """Return what a gateway has shown. It misses nothing here, so it never has to ask."""
        for delta in await self.deltas(gateway):
            shown = self.shown.setdefault(delta.request_id, Shown())
            shown.take(delta)
            assert shown.seq >= delta.seq
        return self.shown

    async def attach(self, request_id: str, gateway: str, after: int, shard: int = 0) -> None:
        """A client has come to `gateway` with the number of what it was shown last."""
        await self.listen(gateway)
        await self.records.attach([request_id], gateway)
        await send(self.redis, self.keys.tokens(shard), Attach(request_id, gateway, after))

    async def left(self) -> set[str]:
        """Keys of requests."""
        names = [name.decode() for name in await self.redis.keys("*")]
        return {name for name in names if {"request", "journal", "logprobs"} & set(name.split(":"))}


def held(worker: Worker) -> dict[str, float]:
    """Return the numbers of open requests and of shards."""
    return {name: worker.load()[name] for name in ("open", "shards")}


@pytest.fixture
def system(redis: Redis, keys: Keys) -> System:
    return System(redis, keys)


def whole(finish: str = "stop", count: int = len(TOKENS)) -> Shown:
    """The answer as the pure pipeline has it, of the first `count` tokens."""
    answer = Answer(request(), Vocabulary(WORDS), Parsers())
    answer.begin = Begin("r1", 1, 0, 7, 3, 2, 1)
    for token in TOKENS[:count]:
        answer.push_token(token)
    if finish == "stop":
        answer.push_stop_token(EOS)
    answer.apply_finish(Finish(finish))  # type: ignore[arg-type]
    shown, delta = Shown(), answer.take_delta()
    assert delta is not None
    shown.add(delta)
    return shown


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
    await system.submit(request())
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
    for first in range(0, len(TOKENS), 5):
        await system.step(TokenRun("r1", 1, max(0, first - 3), tuple(TOKENS[max(0, first - 3) : first + 5])))
        await worker.run_turn()
    await system.finish("r1", len(TOKENS))
    await worker.run_turn()
    assert (await system.show())["r1"] == whole()


async def test_what_comes_twice_or_from_a_former_owner_is_dropped(system: System) -> None:
    await system.submit(request())
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
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
    await system.submit(request())
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
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
    await system.submit(request())
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
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
    await system.submit(request(logprobs=True, thinking=False))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
    logprobs = tuple(TokenLogprob(-index / 2, ((EOS, -1.0),)) for index in range(4))
    await system.step(TokenRun("r1", 1, 0, tuple(TOKENS[:4]), logprobs))
    await system.step(TokenRun("r1", 1, 2, (*TOKENS[2:4], EOS), (*logprobs[2:], TokenLogprob(-9.0)), STOP))
    await worker.run_turn()
    deltas = await system.deltas()
    assert [shown.logprob for delta in deltas for shown in delta.logprobs] == [0, -0.5, -1, -1.5]
    assert deltas[-1].finish_reason == "stop"


# ------------------------------------------------------------------------------------------------ journal, restart


async def test_the_journal_holds_what_was_sent_and_the_stream_is_trimmed(system: System) -> None:
    await system.submit(request(), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    for repeat in range(len(TOKENS)):
        await system.step(TokenRun("r1", 1, repeat, (TOKENS[repeat],)))
        if repeat < 3:  # then it stands still, and must not hold the stream
            await system.step(TokenRun("r2", 1, repeat, (TOKENS[repeat],)))
        if repeat % 10 == 0:
            await worker.run_turn()
    await worker.run_turn()
    journal = await system.records.read_journal("r1")
    assert journal == TOKENS[: len(journal)]
    assert len(TOKENS) - len(journal) < 8
    assert await system.records.read_journal("r2") == TOKENS[:3]
    assert await system.redis.xlen(system.keys.tokens(0)) < 150 < len(TOKENS)
    assert system.counted("p1", "journal_writes_total") >= len(TOKENS) / 16

    successor = await system.worker("p2")
    await system.die("p1")
    await successor.run_turn()
    await system.finish("r1", len(TOKENS))
    await system.finish("r2", 3)
    while successor.load()["open"]:
        await successor.run_turn()
    shown = await system.show()
    assert shown["r1"] == whole()
    assert shown["r2"] == whole(count=3)
    assert await system.left() == set()


@pytest.mark.parametrize("crash_at", ["_send", "_end", "_journal", "_trim", None])
@pytest.mark.parametrize("after", [1, 40, 170, 300])
async def test_a_restart_shows_nothing_twice_and_loses_nothing(
    system: System, monkeypatch: pytest.MonkeyPatch, after: int, crash_at: str | None
) -> None:
    """The first worker dies in the turn that has token `after`, before the given part of it or after all of it."""
    await system.submit(request(), request("r2", stop=("on; 你",)), request("gone"))
    first = await system.worker("p1", read_count=10)
    await first.run_turn()
    await system.begin("r1", "r2", "gone")
    for index, token in enumerate(TOKENS[:after]):
        await system.step(*(TokenRun(one, 1, index, (token,)) for one in ("r1", "r2")))
        if index % 7 == 0 and index != after - 1:
            await first.run_turn()
    await system.finish("gone", 0, Finish("length"))
    if crash_at:

        async def crash(*_: object) -> None:
            raise RuntimeError("killed")

        monkeypatch.setattr(first, crash_at, crash)
        with pytest.raises(RuntimeError, match="killed"):
            await first.run_turn()
    else:
        await first.run_turn()
    await system.show()
    await system.die("p1")

    second = await system.worker("p2", read_count=10)
    for index, token in enumerate(TOKENS[after:], start=after):
        await system.step(*(TokenRun(one, 1, index, (token,)) for one in ("r1", "r2")))
        if index % 20 == 0:
            await second.run_turn()
    await system.finish("r1", len(TOKENS))
    await system.finish("r2", len(TOKENS), Finish("cancelled"))
    await second.run_turn()
    while second.load()["open"]:
        await second.run_turn()
    shown = await system.show()
    assert shown["r1"] == whole()
    assert shown["r2"].content == whole().content.partition("on; 你")[0]
    assert shown["r2"].finish_reason == "stop"
    assert shown["gone"].finish_reason == "length"
    assert await system.left() == set()


@pytest.mark.parametrize("trimmed", [False, True])
async def test_a_restart_after_the_engine_was_replaced(system: System, trimmed: bool) -> None:
    """The record knows of the newer engine, whether the stream still has the older one's steps or not even its own."""
    await system.submit(request())
    first = await system.worker("p1", trim_every=1000)
    await first.run_turn()
    await system.begin("r1")
    await system.generate("r1", 0, 50)
    await system.begin("r1", epoch=2, index=50)
    await system.generate("r1", 50, 100, epoch=2)
    await first.run_turn()
    record = (await system.records.get(["r1"]))["r1"]
    assert record.begin == Begin("r1", 2, 0, 7, 3, 2, 1)
    assert await system.redis.xlen(system.keys.tokens(0)) == 102
    if trimmed:
        await system.redis.xtrim(system.keys.tokens(0), maxlen=0, approximate=False)
    await system.die("p1")
    second = await system.worker("p2")
    await system.step(TokenRun("r1", 1, 100, (EOS,), finish=Finish("error")))  # the old one wakes up
    await system.generate("r1", 100, len(TOKENS), epoch=2)
    await system.finish("r1", len(TOKENS), epoch=2)
    await second.run_turn()
    while second.load()["open"]:
        await second.run_turn()
    assert (await system.show())["r1"] == whole()


async def test_a_journal_that_redis_lost_is_written_again(system: System) -> None:
    await system.submit(request())
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
    await system.generate("r1", 0, 16)
    await worker.run_turn()
    await system.redis.set(system.keys.journal("r1"), pack_ids(TOKENS[:5]))
    await system.generate("r1", 16, 24)
    await worker.run_turn()
    assert await system.records.read_journal("r1") == TOKENS[:24]


# ------------------------------------------------------------------------------------------------ coming back


async def test_who_comes_back_gets_what_it_missed_and_then_the_rest(system: System) -> None:
    await system.submit(request())
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
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
    await system.submit(request())
    first = await system.worker("p1")
    await first.run_turn()
    await system.begin("r1")
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
    for first in (0, 10, 20):
        await system.generate("r1", first, first + 10)
        await system.generate("r2", first, first + 10)
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
    await system.submit(request())
    first = await system.worker("p1")
    await first.run_turn()
    await system.begin("r1")
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
    await system.submit(request(retain_s=60.0))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
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
    await system.submit(request())
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
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


# ------------------------------------------------------------------------------------------------ what goes wrong


async def test_a_gap_ends_the_request_in_an_error(system: System) -> None:
    await system.submit(request(), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    await system.generate("r1", 0, 5)
    await system.generate("r1", 6, 9)
    await system.generate("r2", 0, 9)
    await worker.run_turn()
    deltas = {delta.request_id: delta for delta in await system.deltas()}
    failure = deltas["r1"].failure
    assert failure is not None
    assert (failure.status, deltas["r1"].seq) == (500, 6)
    assert deltas["r2"].failure is None
    assert (await system.records.get(["r1"]))["r1"].cancelled
    await system.finish("r1", 9, Finish("cancelled"))
    await worker.run_turn()
    assert await system.deltas() == []
    assert await system.left() == {"test:request:r2", "test:journal:r2"}


async def test_a_finish_with_a_gap_is_an_error_and_an_error_is_one_anyway(system: System) -> None:
    await system.submit(request(), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
    await system.finish("r1", 5)
    await system.step(TokenRun("r2", 0, 0, (), finish=Finish("error")))  # given up before any engine began
    await worker.run_turn()
    assert [delta.failure is not None and delta.failure.status for delta in await system.deltas()] == [500, 500]
    assert await system.left() == set()


async def test_a_request_without_a_record_is_ignored(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    get = Records.get

    async def counting(records: Records, request_ids: Sequence[str]) -> Any:
        asked.append(list(request_ids))
        return await get(records, request_ids)

    monkeypatch.setattr(Records, "get", counting)
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1")
    await system.generate("r1", 0, 5)
    await worker.run_turn()
    await system.generate("r1", 5, 20)
    await worker.run_turn()
    assert asked == [["r1"]]
    await system.finish("r1", 20)
    await worker.run_turn()
    assert worker.load()["open"] == 0
    assert await system.left() == set()
    assert await system.deltas() == []


async def test_a_request_that_cannot_be_processed_hurts_nobody_else(
    system: System, caplog: pytest.LogCaptureFixture
) -> None:
    await system.submit(request("bad", stop=("",)), request())
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("bad", "r1")
    for index in range(10):
        await system.step(*(TokenRun(one, 1, index, (TOKENS[index],)) for one in ("bad", "r1")))
    # One whose log-probabilities do not match its tokens.
    await system.submit(request("odd", logprobs=True))
    await system.begin("odd")
    await system.step(TokenRun("odd", 1, 0, tuple(TOKENS[:2]), (TokenLogprob(-1.0),)))
    await worker.run_turn()
    deltas = {delta.request_id: delta for delta in await system.deltas()}
    assert [deltas[one].failure is not None for one in ("bad", "odd", "r1")] == [True, True, False]
    assert deltas["r1"].seq == 10
    assert (await system.records.get(["bad"]))["bad"].cancelled
    assert {record.request_id for record in caplog.records if "cannot be" in record.message} == {"bad", "odd"}  # type: ignore[attr-defined]
    for one in ("bad", "odd", "r1"):
        await system.finish(one, 10 if one != "odd" else 2, Finish("cancelled"))
    await worker.run_turn()
    assert await system.left() == set()


async def test_an_unreadable_entry_ends_only_the_requests_in_it(
    system: System, caplog: pytest.LogCaptureFixture
) -> None:
    await system.submit(request(), request("r2"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    await system.generate("r1", 0, 3)
    await worker.run_turn()
    await system.redis.xadd(system.keys.tokens(0), {"v": "9", "m": "r1's token 3"})
    await worker.run_turn()
    assert "skipped" in caplog.text
    await system.generate("r1", 4, 6)
    await system.generate("r2", 0, 6)
    await worker.run_turn()
    failed = {delta.request_id: delta.failure is not None for delta in await system.deltas()}
    assert failed == {"r1": True, "r2": False}


async def test_tokens_are_journaled_at_once_beside_a_replica_that_reads_an_older_version(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not read them, and may be the next owner of the shard."""
    await system.submit(request())
    current = await system.worker()
    await current.run_turn()
    await system.begin("r1")
    await system.generate("r1", 0, 3)
    await current.run_turn()
    assert await system.redis.xlen(system.keys.tokens(0))
    monkeypatch.setattr("services.postproc.worker.VERSION", VERSION + 1)
    await system.generate("r1", 3, 5)
    await current.run_turn()
    assert await system.redis.xlen(system.keys.tokens(0)) == 0
    assert await system.redis.strlen(system.keys.journal("r1")) == 5 * TOKEN_BYTES


@pytest.mark.parametrize("damaged", ["request", "journal", "type of journal", "logprobs"])
async def test_a_damaged_request_is_told_and_hurts_nobody_else(system: System, keys: Keys, damaged: str) -> None:
    """A worker that takes over the shard meets it."""
    await system.submit(request("bad", logprobs=True), request("good"))
    before = await system.worker()
    await before.run_turn()
    await system.begin("bad", "good")
    await system.generate("bad", 0, 20)
    await before.run_turn()
    await before.drain()
    await system.die("p1")
    match damaged:
        case "request":
            await system.redis.hset(keys.request("bad"), "request", b"\xc1")
        case "journal":
            await system.redis.append(keys.journal("bad"), b"x")
        case "type of journal":
            await system.redis.delete(keys.journal("bad"))
            await system.redis.sadd(keys.journal("bad"), "oops")  # type: ignore[misc]
        case "logprobs":
            await system.redis.lset(keys.logprobs("bad"), 0, b"\xc1")  # type: ignore[misc]
    worker = await system.worker("p2")
    await worker.run_turn()
    await system.generate("bad", 20, 22)
    await system.generate("good", 0, len(TOKENS))
    await system.finish("good", len(TOKENS))
    while await system.left():
        await worker.run_turn()
    told = [delta.failure for delta in await system.deltas() if delta.request_id == "bad" and delta.failure]
    assert [failure.code for failure in told] == ["unreadable_state"]
    cancels = LogReader(system.redis, {keys.control(): "0"})
    assert [message for _, _, message in await cancels.read(9, 0)] == [Cancel(("bad",))], "its engine need not go on"


async def test_a_redis_that_forgot_everything_is_served_anew(system: System) -> None:
    await system.submit(request("lost"))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("lost")
    await system.generate("lost", 0, 10)
    await worker.run_turn()
    await system.show()
    await system.redis.flushall()
    await system.leases["p1"].renew("ready")
    await system.listen("g1")
    await system.generate("lost", 10, 20)  # its engine knows nothing of it
    await system.submit(request())
    await system.begin("r1")
    await system.generate("r1", 0, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    while not (await system.show()).get("r1", Shown()).done:
        await worker.run_turn()
    assert system.shown["r1"] == whole()
    assert await system.left() == set()
    while worker.load()["open"]:
        await worker.run_turn()
    [delta] = await system.deltas()
    assert (delta.request_id, delta.failure is not None) == ("lost", True)
    assert worker.load()["shards"] == 1


async def test_a_request_that_redis_forgot_ends_in_an_error(system: System) -> None:
    now = 0.0
    await system.submit(request(), request("r2"))
    worker = await system.worker(clock=lambda: now)
    await worker.run_turn()
    await system.begin("r1", "r2")
    await system.generate("r1", 0, 10)
    await system.generate("r2", 0, 10)
    await worker.run_turn()
    shown = (await system.show())["r1"].seq
    await system.redis.delete(system.keys.request("r1"))
    for _ in range(2):
        assert worker.load()["open"] == 2
        now += 60
        await worker.run_turn()
    assert worker.load()["open"] == 1
    [delta] = await system.deltas()
    assert delta.failure is not None
    assert (delta.request_id, delta.failure.status, delta.start) == ("r1", 503, shown)
    assert await system.left() == {"test:request:r2", "test:journal:r2"}, "a journal without its record"


async def test_while_redis_does_not_answer_the_worker_waits_and_loses_nothing(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write fails once on its way, and once with its reply on the way back."""
    failures = iter([1, 2] * 100)
    run = Fence.run

    async def broken(fence: Fence, script: Any, keys: Any, args: Any) -> Any:
        match next(failures, 0):
            case 1:
                raise RedisConnectionError("down")
            case 2:
                await run(fence, script, keys, args)
                raise RedisTimeoutError("slow")
        return await run(fence, script, keys, args)

    monkeypatch.setattr(Fence, "run", broken)
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.0)
    await system.submit(request(), request("r2", stop=("on; 你",), retain_s=60.0))
    worker = await system.worker()
    await worker.run_turn()
    await system.begin("r1", "r2")
    for first in range(0, len(TOKENS), 40):
        for one in ("r1", "r2"):
            await system.generate(one, first, min(first + 40, len(TOKENS)))
        await worker.run_turn()
    await system.finish("r1", len(TOKENS))
    await system.finish("r2", len(TOKENS), Finish("cancelled"))
    await worker.run_turn()
    shown = await system.show()
    assert shown["r1"] == whole()
    assert shown["r2"].finish_reason == "stop"
    assert await system.records.read_journal("r2") == TOKENS
    assert await system.left() == {"test:request:r2", "test:journal:r2"}


# ------------------------------------------------------------------------------------------------ shards


WRITES = ("deltas", "cancel", "journal", "retain", "delete", "trim")


async def end_two_of_three(system: System, worker: Worker) -> None:
    """Let the worker know three requests, and leave it their tokens and the ends of two to read."""
    await worker.run_turn()
    await system.begin("r1", "r2", "r3")
    for one in ("r1", "r2", "r3"):
        await system.generate(one, 0, len(TOKENS))
    await system.finish("r1", len(TOKENS))
    await system.finish("r2", len(TOKENS))


def stop_before(worker: Worker, what: str, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Let the worker stop right before a write; return the event that says it has, and the one that lets it go on."""
    write = worker._outbox._write
    stopped, go_on = asyncio.Event(), asyncio.Event()

    async def stopping(point: str, attempt: Any) -> Any:
        if point == what:
            stopped.set()
            await go_on.wait()
        return await write(point, attempt)

    monkeypatch.setattr(worker._outbox, "_write", stopping)
    return stopped, go_on


@pytest.mark.parametrize("what", WRITES)
async def test_a_paused_owner_that_wakes_writes_nothing(
    system: System, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It stops right before a write, another takes over and ends everything, and then it goes on."""
    await system.submit(request(retain_s=60.0), request("r2"), request("r3", "g3", stop=("cat",)))
    paused = await system.worker("p1", trim_every=1)
    await end_two_of_three(system, paused)
    await system.attach("r3", "g2", 0)
    stopped, go_on = stop_before(paused, what, monkeypatch)
    task = asyncio.create_task(paused.run_turn())
    await stopped.wait()
    await system.die("p1")
    other = await system.worker("p2")
    await other.run_turn()
    await other.run_turn()
    before = {key: await system.redis.dump(key) for key in await system.redis.keys("*")}
    go_on.set()
    await task
    assert {key: await system.redis.dump(key) for key in await system.redis.keys("*")} == before
    assert held(paused) == {"open": 0.0, "shards": 0.0}
    await system.show("g1")
    assert system.shown["r1"] == system.shown["r2"] == whole()


@pytest.mark.parametrize("what", WRITES)
async def test_a_turn_that_is_running_ends_before_the_shards_go(
    system: System, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The process is told to end right before a write. What it has read by then is in no stream any more."""
    await system.submit(request(retain_s=60.0), request("r2"), request("r3", stop=("cat",)))
    worker = await system.worker("p1", trim_every=1)
    await end_two_of_three(system, worker)
    stopped, go_on = stop_before(worker, what, monkeypatch)
    serving = asyncio.create_task(worker.serve())
    async with asyncio.timeout(PATIENCE_S):
        await stopped.wait()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    go_on.set()
    await worker.drain()
    await system.die("p1")
    other = await system.worker("p2")
    await other.run_turn()
    await system.finish("r3", len(TOKENS), Finish("cancelled"))
    await other.run_turn()
    assert held(other) == {"open": 0.0, "shards": 1.0}
    shown = await system.show()
    assert shown["r1"] == shown["r2"] == whole()
    assert shown["r3"].finish_reason == "stop"
    assert await system.left() == {"test:request:r1", "test:journal:r1"}
    assert 0 < await system.redis.ttl("test:request:r1") <= 60


async def test_replicas_share_shards_and_hand_them_over(system: System) -> None:
    now = 0.0
    await system.submit(request("r0", shard=0), request("r1", shard=1))
    first = await system.worker("p1", clock=lambda: now, shards=2)
    await first.run_turn()
    assert first.load()["shards"] == 2
    for shard in (0, 1):
        await system.step(begins=[Begin(f"r{shard}", 1, 0, 7, 3, 2, 1)], shard=shard)
        await system.step(TokenRun(f"r{shard}", 1, 0, tuple(TOKENS[:5])), shard=shard)
    await first.run_turn()
    assert held(first) == {"open": 2.0, "shards": 2.0}

    second = await system.worker("p2", clock=lambda: now, shards=2)
    await second.run_turn()
    assert second.load()["shards"] == 0
    now += 1
    await first.run_turn()
    await second.run_turn()
    assert (held(first), held(second)) == ({"open": 1.0, "shards": 1.0}, {"open": 1.0, "shards": 1.0})

    await first.drain()
    assert held(first) == {"open": 0.0, "shards": 0.0}
    await system.leases["p1"].renew("draining")
    now += 1
    await second.run_turn()
    for shard in (0, 1):
        await system.step(TokenRun(f"r{shard}", 1, 5, (*TOKENS[5:], EOS), finish=STOP), shard=shard)
    await second.run_turn()
    while second.load()["open"]:
        await second.run_turn()
    await system.show()
    assert system.shown == {"r0": whole(), "r1": whole()}
    assert await system.left() == set()


async def test_a_worker_that_was_paused_sends_nothing_for_a_shard_it_lost(system: System) -> None:
    now = 0.0
    await system.submit(request())
    paused = await system.worker("p1", clock=lambda: now)
    await paused.run_turn()
    await system.begin("r1")
    await system.generate("r1", 0, 10)
    await paused.run_turn()
    await system.die("p1")
    other = await system.worker("p2")
    await other.run_turn()
    before = await system.redis.xlen(system.keys.deltas("g1"))
    await system.generate("r1", 10, 20)
    now += 60
    await system.leases["p1"].renew("ready")
    await paused.run_turn()
    assert held(paused) == {"open": 0.0, "shards": 0.0}
    assert await system.redis.xlen(system.keys.deltas("g1")) == before
    await other.run_turn()
    assert (await system.show())["r1"].seq == 20


async def test_a_pause_while_reading_is_noticed_before_sending(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    await system.submit(request())
    paused = await system.worker("p1", clock=lambda: now)
    await paused.run_turn()
    await system.begin("r1")
    await system.generate("r1", 0, 10)
    read = LogReader.read

    async def slow(reader: LogReader, count: int, block_ms: int) -> Any:
        nonlocal now
        found = await read(reader, count, block_ms)
        await system.die("p1")
        monkeypatch.undo()
        other = await system.worker("p2")
        await other.run_turn()
        now += 60
        return found

    monkeypatch.setattr(LogReader, "read", slow)
    await paused.run_turn()
    await paused.run_turn()
    assert held(paused) == {"open": 0.0, "shards": 0.0}
    numbers = [delta.seq for delta in await system.deltas()]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 10


async def test_a_shard_lost_and_regained_while_reading_starts_over(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    await system.submit(request())
    paused = await system.worker("p1", clock=lambda: now, journal_every=100)
    await paused.run_turn()
    await system.begin("r1")
    await system.generate("r1", 0, 7)
    await paused.run_turn()
    await system.generate("r1", 7, 20)
    read = LogReader.read

    async def slow(reader: LogReader, count: int, block_ms: int) -> Any:
        nonlocal now
        found = await read(reader, count, block_ms)
        monkeypatch.undo()
        await system.die("p1")
        other = await system.worker("p2", journal_every=100)
        await other.run_turn()
        await other.drain()
        await system.die("p2")
        now += 60
        return found

    monkeypatch.setattr(LogReader, "read", slow)
    await paused.run_turn()
    await system.finish("r1", 20, Finish("length"))
    await paused.run_turn()
    assert (await system.show())["r1"] == whole("length", 20)


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
    await system.submit(request(tools=True))
    worker = await system.worker(vocabulary=tokenizer)
    await worker.run_turn()
    await system.begin("r1")
    await system.generate("r1", 0, len(tokens), tokens)
    await system.step(TokenRun("r1", 1, len(tokens), (eos,), finish=Finish("stop", stop_token=eos)))
    await worker.run_turn()
    shown = (await system.show())["r1"]
    assert (shown.reasoning, shown.content) == ("Où est la gare ? 你好 😀", "Let me look.")
    assert shown.functions == [("f", '{"a": "é"}')]
    thought = tokens.index(tokenizer.token_id("</think>")) + 1  # type: ignore[arg-type]
    assert shown.usage == Usage(7, len(tokens) + 1, thought, 3, 2, 1)
    assert shown.finish_reason == "tool_calls"
