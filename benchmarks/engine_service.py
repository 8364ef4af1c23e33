"""A loaded model inside the engine as it is served: Redis, a postproc and a reader that stands for the gateway.

The service runs in this process, in whose event loop and model thread it runs when it ships. Redis (on disk, as
`millrace serve` starts it), the postproc and the reader (benchmarks/engine_client.py) are processes of their own.
Requests are submitted as the gateway submits them, all at once.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from benchmarks.engine_client import Load, Passage
from benchmarks.vocabulary import write_tokenizer
from cli.redis_server import RedisServer
from services.engine.__main__ import compose
from services.engine.metrics import EngineMetrics
from services.engine.run.runner import Runner
from services.engine.schedule.sequence import EngineFacts
from services.engine.settings import EngineSettings
from services.engine.transport.grammars import Compile
from services.engine.transport.handler import SERVICE
from shared.bus import leases
from shared.bus.client import connect
from shared.bus.keys import Keys
from shared.grammar.compiler import GrammarCompiler
from shared.messages import Sampling
from shared.model.tokenizer import Tokenizer
from shared.service import Life

NAMESPACE = "bench"
LOOK_S = 0.05
STOP_S = 30.0


def measure(
    loaded: tuple[Runner, int], settings: EngineSettings, facts: EngineFacts, loads: Sequence[Load]
) -> list[Passage]:
    """Measure one load after the other, on one running system. Addresses of `settings` and `loads` are filled in.

    Args:
        loaded: what `services.engine.run.assembly.runner_for` returns.
    """
    with tempfile.TemporaryDirectory(prefix="millrace-") as scratch:
        root = Path(scratch)
        write_tokenizer(root / "model", facts.model.vocab_size)
        with RedisServer(root / "redis", persistence=True) as server, _postproc(server.url, root / "model"):
            settings = replace(settings, redis_url=server.url, namespace=NAMESPACE, name=SERVICE)
            loads = [replace(load, redis_url=server.url, namespace=NAMESPACE) for load in loads]
            tokenizer = Tokenizer.load(root / "model")
            compile_grammar = GrammarCompiler(tokenizer, facts.model.vocab_size, facts.model.eos_ids).compile
            return asyncio.run(_serve(loaded, settings, facts, compile_grammar, loads))


def load_of(requests: int, sampling: Sampling) -> Load:
    """Return a load of `requests` at once, of the usual length."""
    return Load(redis_url="", namespace="", requests=requests, sampling=sampling)


@contextlib.contextmanager
def _postproc(redis_url: str, model: Path) -> Iterator[None]:
    told = {"REDIS_URL": redis_url, "MODEL": str(model), "NAMESPACE": NAMESPACE, "LOG_LEVEL": "warning"}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    environ |= {f"MILLRACE_{name}": value for name, value in told.items()}
    process = subprocess.Popen([sys.executable, "-m", "services.postproc"], env=environ)
    try:
        yield
    finally:
        process.terminate()
        process.wait(STOP_S)


async def _serve(
    loaded: tuple[Runner, int],
    settings: EngineSettings,
    facts: EngineFacts,
    compile_grammar: Compile,
    loads: Sequence[Load],
) -> list[Passage]:
    redis = connect(settings.redis_url)
    metrics = EngineMetrics(CollectorRegistry())
    life = Life(SERVICE, compose(settings, redis, facts, compile_grammar, lambda: loaded, metrics), settings, redis)
    living = asyncio.create_task(life.run())
    asking = asyncio.create_task(_ask(redis, loads))
    await asyncio.wait((living, asking), return_when=asyncio.FIRST_COMPLETED)
    life.stop.set()
    if await living or not asking.done():
        asking.cancel()
        raise SystemExit("the engine ended before it had answered; see its log above")
    await redis.aclose()
    return asking.result()


async def _ask(redis: Redis, loads: Sequence[Load]) -> list[Passage]:
    """Run the loads, after a short one that warms connections and scripts."""
    while not await leases.live(redis, Keys(NAMESPACE), "postproc"):  # noqa: ASYNC110  # what is waited for is in Redis
        await asyncio.sleep(LOOK_S)
    await _client(replace(loads[0], requests=1))
    return [await _client(load) for load in loads]


async def _client(load: Load) -> Passage:
    """Run one load in a client process.

    Raises:
        SystemExit: the client failed, and has printed the reason.
    """
    words = (sys.executable, "-m", "benchmarks.engine_client", msgspec.json.encode(load).decode())
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    if process.returncode:
        raise SystemExit("the client of the engine failed")
    return msgspec.json.decode(printed, type=Passage)
