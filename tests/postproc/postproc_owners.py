"""A world around three answers, driven step by step: an engine, gateways, workers that die or stop at any write."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from postproc_stand_in import EOS, Shown, StandIn, cut, every_byte, request
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.postproc.detokenize import Vocabulary
from services.postproc.metrics import PostprocMetrics
from services.postproc.settings import PostprocSettings
from services.postproc.worker import SERVICE, Worker
from shared.bus import command
from shared.keys import GENERATE, Keys
from shared.leases import Lease
from shared.messages import Attach, Begin, Deltas, Finish, Generate, Request, TokenLogprob, TokenRun, Tokens, pack_ids
from shared.records import Records
from shared.streams import LogReader, send

TEXT = "Hm, “two” 😀.\n</think>\n\nA cat. " + "And on; 你好。\n" * 3
PIECES = cut(TEXT, every_byte(TEXT)[::2])
WORDS = StandIn([piece for piece in PIECES if isinstance(piece, bytes)])
TOKENS = WORDS.tokens(PIECES)
LOGPROBS = [TokenLogprob(-index / 2, ((EOS, -9.0),)) for index in range(len(TOKENS) + 1)]
WRITES = ("attach", "deltas", "cancel", "journal", "retain", "delete", "trim")
READ_COUNT = 5  # entries of a stream that a worker reads in a turn

T = TypeVar("T")


class Killed(Exception):
    """What a crash is in one process."""


class Haunted(Worker):
    """A worker that can be made to die, or to stop until it is woken, before or after its next write of a kind."""

    kill_at = ""
    halt_at = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.halted = asyncio.Event()
        self.woken = asyncio.Event()

    async def _write(self, what: str, write: Callable[[], Awaitable[T]]) -> T:
        await self._pass(f"{what}.before")
        done = await super()._write(what, write)
        await self._pass(f"{what}.after")
        return done

    async def _pass(self, point: str) -> None:
        if point == self.kill_at:
            raise Killed
        if point == self.halt_at:
            self.halt_at = ""
            self.halted.set()
            await self.woken.wait()


class Client:
    """Who waits for one answer, over one gateway after another."""

    def __init__(self, redis: Redis, keys: Keys, one: Request, names: str = "g") -> None:
        self.redis, self.keys, self.request = redis, keys, one
        self.shown = Shown()
        self.asked = False
        self._names = (f"{one.id}-{names}{number}" for number in itertools.count(1))
        self._reader = LogReader(redis, {})
        self.gateway = ""

    async def connect(self) -> None:
        """Come to a gateway; to another one with the number of what was shown last."""
        again = self.gateway
        self.gateway = next(self._names)
        key = self.keys.deltas(self.gateway)
        await command(self.redis, "XGROUP", "CREATE", key, "none", "0", "MKSTREAM")
        self._reader = LogReader(self.redis, {key: "0"})
        if again:
            await self.attach()

    async def attach(self) -> None:
        self.asked = True
        message = Attach(self.request.id, self.gateway, self.shown.seq)
        await send(self.redis, self.keys.tokens(self.request.shard), message)

    async def read(self) -> None:
        """The rule of gateways."""
        for _, _, message in await self._reader.read(1000, 0):
            assert isinstance(message, Deltas)
            for delta in message.items:
                if delta.request_id != self.request.id or self.shown.done:
                    continue
                before = self.shown.seq
                if self.shown.take(delta):
                    self.asked &= self.shown.seq == before
                elif not self.asked:
                    await self.attach()

    async def miss(self) -> None:
        """Lose what was not read yet."""
        await self.redis.xtrim(self.keys.deltas(self.gateway), maxlen=0, approximate=False)


class World:
    """The engine's side, workers, and clients of three answers: plain, with a stop string, with log-probabilities."""

    def __init__(self, redis: Redis, keys: Keys, retain_s: float) -> None:
        self.redis, self.keys = redis, keys
        self.records = Records(redis, keys)
        self.retains = retain_s > 0
        self.requests = [
            request("r1", "r1-g1", retain_s=retain_s),
            request("r2", "r2-g1", retain_s=retain_s, stop=("on; 你",)),
            request("r3", "r3-g1", retain_s=retain_s, logprobs=True, return_token_ids=True),
        ]
        self.clients = [Client(redis, keys, one) for one in self.requests]
        self.workers: dict[str, Haunted] = {}
        self.halted: dict[str, asyncio.Task[None]] = {}
        self.sent = 0  # tokens of every request
        self.epoch = 1
        self.ended = False
        self._names = (f"p{number}" for number in itertools.count(1))
        self._now = 0.0

    async def begin(self) -> None:
        for one, client in zip(self.requests, self.clients, strict=True):
            await self.records.submit(GENERATE, Generate(one, pack_ids([1]), max_tokens=1000))
            await client.connect()
        await self.say_begin()

    # ------------------------------------------------------------------------------------------------ the engine

    async def say_begin(self) -> None:
        begins = tuple(Begin(one.id, self.epoch, self.sent, 7, 3, 2, 1) for one in self.requests)
        await self._step(Tokens(begins, ()))

    async def generate(self, number: int) -> None:
        """More tokens, and before them up to three that were sent already."""
        end = min(self.sent + number, len(TOKENS))
        if self.ended or end == self.sent:
            return
        first = max(0, self.sent - number % 4)
        runs = tuple(
            TokenRun(
                one.id,
                self.epoch,
                first,
                tuple(TOKENS[first:end]),
                tuple(LOGPROBS[first:end]) if one.output.logprobs else None,
            )
            for one in self.requests
        )
        self.sent = end
        await self._step(Tokens((), runs))

    async def replace_engine(self) -> None:
        """The former one goes on for a while, in vain, with tokens that were never drawn."""
        if self.ended:
            return
        old, self.epoch = self.epoch, self.epoch + 1
        await self.say_begin()
        wrong = tuple(TokenRun(one.id, old, self.sent, (TOKENS[0],) * 3) for one in self.requests)
        await self._step(Tokens((), wrong))

    async def finish(self) -> None:
        """All that is missing, and the end."""
        while self.sent < len(TOKENS):
            await self.generate(8)
        if not self.ended:
            self.ended = True
            end = TokenRun("", self.epoch, self.sent, (EOS,), finish=Finish("stop", EOS))
            runs = []
            for one in self.requests:
                cancelled = (record := (await self.records.get([one.id])).get(one.id)) is not None and record.cancelled
                finish = Finish("cancelled") if cancelled else end.finish
                tokens = () if cancelled else end.tokens
                logprobs = (LOGPROBS[-1],) * len(tokens) if one.output.logprobs else None
                runs.append(TokenRun(one.id, self.epoch, self.sent, tokens, logprobs, finish))
            await self._step(Tokens((), tuple(runs)))

    async def _step(self, message: Tokens) -> None:
        await send(self.redis, self.keys.tokens(0), message)

    # ------------------------------------------------------------------------------------------------ workers

    async def start(self) -> Haunted:
        name = next(self._names)
        settings = PostprocSettings(
            redis_url="", model="", name=name, journal_every=8, trim_every=4, read_count=READ_COUNT, lease_ms=24
        )
        await Lease(self.redis, self.keys, SERVICE, name, ttl_ms=60_000).renew("ready")
        metrics = PostprocMetrics(CollectorRegistry())
        self.workers[name] = Haunted(self.redis, self.keys, settings, Vocabulary(WORDS), metrics, clock=self._clock)
        return self.workers[name]

    def _clock(self) -> float:
        """Every look at it is a second later, so that every turn looks who is there."""
        self._now += 1
        return self._now

    async def expire(self, name: str) -> None:
        await Lease(self.redis, self.keys, SERVICE, name, ttl_ms=1).release()

    async def turn(self, which: int, kill_at: str = "", halt_at: str = "") -> None:
        """A worker that runs, or a new one, does a turn; it may not reach its end."""
        free = [name for name in self.workers if name not in self.halted]
        worker = self.workers[free[which % len(free)]] if free else await self.start()
        name = next(name for name, each in self.workers.items() if each is worker)
        worker.kill_at, worker.halt_at = kill_at, halt_at
        task = asyncio.create_task(worker.turn())
        halting = asyncio.create_task(worker.halted.wait())
        await asyncio.wait({task, halting}, return_when=asyncio.FIRST_COMPLETED)
        halting.cancel()
        if task.done():
            if task.exception() is None:
                return
            assert isinstance(task.exception(), Killed), task.exception()
            del self.workers[name]
        else:
            self.halted[name] = task
        await self.expire(name)

    async def wake(self, which: int, renew: bool) -> None:
        """One that was halted goes on as if no time had passed."""
        if not self.halted:
            return
        name = list(self.halted)[which % len(self.halted)]
        task, worker = self.halted.pop(name), self.workers[name]
        if renew:
            await Lease(self.redis, self.keys, SERVICE, name, ttl_ms=60_000).renew("ready")
        worker.halted.clear()
        worker.woken.set()
        await task
        worker.woken.clear()
        if not renew:
            del self.workers[name]

    # ------------------------------------------------------------------------------------------------ the end

    async def catch_up(self) -> None:
        """Give every worker the turns in which an owner reads all that is in the stream, clients reading meanwhile.

        A worker that takes a shard over begins at the beginning of its stream and reads READ_COUNT entries a turn, so
        one turn promises nothing about the last entry.
        """
        unread = await self.redis.xlen(self.keys.tokens(0))
        for _ in range(unread // READ_COUNT + 1):
            for which in range(max(1, len(self.workers))):
                await self.turn(which)
            for client in self.clients:
                await client.read()

    async def settle(self) -> None:
        """Everybody wakes, the engine ends, and workers read on. Who then lacks something asks for it, once."""
        while self.halted:
            await self.wake(0, renew=False)
        await self.finish()
        await self.catch_up()
        for client in self.clients:
            if not client.shown.done:
                await client.attach()
        await self.catch_up()
        assert all(client.shown.done for client in self.clients), [client.shown for client in self.clients]
        assert not any(self._open())

    def _open(self) -> list[float]:
        return [worker.load()["open"] for worker in self.workers.values()]
