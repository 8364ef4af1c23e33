"""Everything around a worker: the engine that writes its steps, and the gateways that read its deltas."""

from collections.abc import Sequence
from typing import Any

from postproc_stand_in import EOS, Shown, StandIn, cut, every_byte, request
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.postproc.__main__ import compose
from services.postproc.owned_shards import SERVICE
from services.postproc.settings import PostprocSettings
from services.postproc.text.answer import Answer, Parsers
from services.postproc.text.detokenize import TokenBytes, Vocabulary
from services.postproc.worker import Worker
from shared.bus.client import command
from shared.bus.keys import GENERATE, Keys
from shared.bus.leases import Lease
from shared.bus.records import Records
from shared.bus.streams import LogReader, send
from shared.messages import (
    Attach,
    Begin,
    Delta,
    Deltas,
    Finish,
    Generate,
    Request,
    TokenRun,
    Tokens,
    pack_ids,
)

TEXT = "The café, “two” 😀.\n\nHm.\n</think>\n\nA cat. " + "And so on, and on; 你好。\n" * 12
PIECES = cut(TEXT, every_byte(TEXT)[::2])
WORDS = StandIn([piece for piece in PIECES if isinstance(piece, bytes)])
TOKENS = WORDS.tokens(PIECES)
STOP = Finish("stop", stop_token=EOS)


class System:
    """Everything around the workers."""

    def __init__(self, redis: Redis, keys: Keys, own: Redis) -> None:
        """`own`: the workers' client."""
        self.redis = redis
        self.own = own
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
        self.leases[name] = Lease(self.own, self.keys, SERVICE, name, ttl_ms=60_000)
        await self.leases[name].renew("ready")
        more = {"clock": clock} if clock else {}
        worker = compose(settings, self.own, Vocabulary(vocabulary), self.metrics[name], **more)
        await worker.startup()
        return worker

    async def started(self, *requests: Request, **options: Any) -> Worker:
        """Return a worker that owns its shards, when requests have been submitted and an engine has begun them."""
        await self.submit(*requests)
        worker = await self.worker(**options)
        await worker.run_turn()
        await self.begin(*(one.id for one in requests))
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
