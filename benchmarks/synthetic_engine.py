"""Synthetic engine without a model: it reads real `generate` entries and emits one token per sequence and step.

Everything around it is real: the work stream, the record and its epoch, the tokens stream, acks. It paces itself by a
fixed number of steps per second, or in closed loop (`--window`) by the number of tokens that the client has not read.
It writes emission times to a shared array, from which the client computes each token's latency.
"""

import argparse
import asyncio
import time
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.bus.client import connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.ownership import EntryOwnership
from shared.bus.streams import LogWriter
from shared.bus.work_stream import WorkStream
from shared.messages import Begin, Finish, Generate, TokenRun, Tokens, unpack_ids

REPORT_TOKENS = 8192


class Board:
    """Memory shared by engine and client through a file: emission times, and how many tokens the client has read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = 2 + REPORT_TOKENS
        self.cells = np.memmap(path, np.float64, "r+" if path.exists() else "w+", shape=(size,))

    @property
    def received(self) -> float:
        """Number of tokens that the client has read."""
        return float(self.cells[0])

    @received.setter
    def received(self, count: float) -> None:
        self.cells[0] = count

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the engine while it emitted."""
        return float(self.cells[1])

    @cpu_s.setter
    def cpu_s(self, seconds: float) -> None:
        self.cells[1] = seconds

    def emitted_at(self) -> NDArray[np.float64]:
        """Return [REPORT_TOKENS] monotonic seconds at which token i of every stream was emitted."""
        return self.cells[2:]


async def collect(work: WorkStream, streams: int) -> list[tuple[str, Generate]]:
    """Wait until `streams` requests have arrived."""
    taken: list[tuple[str, Generate]] = []
    while len(taken) < streams:
        for delivery in await work.read_new(streams - len(taken), 1000):
            assert isinstance(delivery.message, Generate)
            taken.append((delivery.entry_id, delivery.message))
    return taken


async def run(args: argparse.Namespace) -> None:
    keys = Keys(args.namespace)
    redis = connect(args.redis_url)
    board = Board(args.board)
    ownership = EntryOwnership(redis, keys, GENERATE, "engine", "synthetic")
    work = WorkStream(redis, keys, GENERATE, "engine", "synthetic", 3)
    await work.join()
    log = cache(lambda shard: LogWriter(redis, keys.tokens(shard)))
    for _ in range(args.rounds):
        await one_round(args, log, board, ownership, work)
    await redis.aclose()


async def one_round(args, log, board, ownership, work) -> None:  # type: ignore[no-untyped-def]
    """Serve one batch of `--streams` requests from start to end."""
    taken = await collect(work, args.streams)
    epochs = await ownership.raise_epochs([(entry_id, message.request.id) for entry_id, message in taken])
    shards = sorted({message.request.shard for _, message in taken})
    by_shard = {s: [m.request.id for _, m in taken if m.request.shard == s] for s in shards}
    now = time.monotonic()
    for shard, ids in by_shard.items():
        begins = tuple(
            Begin(m.request.id, epochs[m.request.id], 0, len(unpack_ids(m.prompt)), 0, 0, 0)
            for _, m in taken
            if m.request.id in set(ids)
        )
        await log(shard).send(Tokens(begins, ()))
    board.received = 0
    emitted_at = board.emitted_at()
    token = (args.token,)
    cpu = time.process_time()
    start = time.monotonic()
    for step in range(args.tokens):
        if args.window:
            while step * args.streams - board.received > args.window:  # noqa: ASYNC110
                await asyncio.sleep(0.0005)  # the client is another process; only its counter can be polled
        else:
            now = time.monotonic()
            due = start + step / args.steps_per_s
            if due > now:
                await asyncio.sleep(due - now)
        emitted_at[step] = time.monotonic()
        finish = Finish("length") if step == args.tokens - 1 else None
        for shard, ids in by_shard.items():
            runs = tuple(TokenRun(i, epochs[i], step, token, None, finish) for i in ids)
            await log(shard).send(Tokens((), runs))
    board.cpu_s = time.process_time() - cpu
    await work.ack([entry_id for entry_id, _ in taken])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--board", type=Path, required=True, help="file shared with the client")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="tokens per stream")
    parser.add_argument("--token", type=int, required=True, help="the token id to emit")
    parser.add_argument("--steps-per-s", type=float, default=100.0)
    parser.add_argument("--window", type=int, default=0, help="closed loop: tokens in flight at most; 0: paced")
    parser.add_argument("--rounds", type=int, default=1)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
