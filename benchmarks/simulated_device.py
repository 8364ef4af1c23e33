"""The engine's process for a machine without a GPU: service, loop, scheduler and runner as they ship, and a device that
is a clock.

    python -m benchmarks.simulated_device --trace FILE [--host 1.0] [--device 1.0]

Reads MILLRACE_* as `python -m services.engine` does, and writes when each step was planned, launched, ended and read.
Launches are calls that take the CPU as long as those of a GPU: some of it in Python, most of it without the
interpreter's lock. A step begins on the device when its launch has begun and the step before has ended, and takes
`h200_ms` (benchmarks.virtual_load) times --device, or until it is launched. benchmarks.served_gaps runs all of it
among the other services.
"""

import argparse
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from redis.asyncio import Redis
from torch import Tensor

from benchmarks.virtual_load import H200, h200_ms
from services.engine.__main__ import compose
from services.engine.metrics import EngineMetrics
from services.engine.model.inputs import AttentionBuffers, KVCache, StepInput, Stream
from services.engine.run.decode_rows import DecodeRows
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.pieces import StepPieces
from services.engine.run.runner import Launched, ModelRunner
from services.engine.run.sampler import Sampled
from services.engine.run.sampling_plan import SamplingPlan
from services.engine.run.step import StepBuilder
from services.engine.run.upload import upload
from services.engine.schedule.plan import Plan
from services.engine.schedule.sequence import EngineFacts
from services.engine.settings import EngineSettings
from shared.launch import launch
from shared.model.config import load_model_config

WORD = 500  # the token that is always drawn
LAYERS, BLOCKS, CONTEXT = 28, 31_000, 16_384
# Seconds of a piece's launch, of attention's and the Python before it; with these, a step takes a host 1 to 9 ms.
REPLAY_S, ATTENTION_S, PYTHON_S = 25e-6, 20e-6, 20e-6
SAMPLING_CALLS = 6
LAUNCHES = 16  # of a layer that is launched whole
NO_LOCK_BYTES = 5 * 1024 + 1  # zlib keeps the lock for less


class Step(msgspec.Struct, array_like=True):
    """Times of one step, seconds of the monotonic clock."""

    planned: float  # `launch` was called
    began: float = 0.0  # on the device
    sent: float = 0.0  # the output of the step before the last was on its way
    launched: float = 0.0
    ended: float = 0.0  # on the device
    read: float = 0.0  # by the model's thread
    rows: int = 0
    tokens: int = 0  # sampled
    prefill: bool = False
    waited: float = 0.0  # seconds for the lock
    cpu: float = 0.0  # seconds of the thread in `launch`
    thread: float = 0.0  # seconds of the thread in all, before it
    ahead: bool = False  # the step before had not been read


class Host:
    """Launches that take a CPU's time and no GPU."""

    def __init__(self, slowness: float) -> None:
        self._room = bytes(1 << 20)
        self.waited = 0.0
        per_byte = _best(lambda: zlib.crc32(self._room)) / len(self._room)
        per_turn = _best(lambda: _turn(100_000)) / 100_000
        self._per_byte, self._per_turn, self._slowness = per_byte, per_turn, slowness

    def call(self, seconds: float) -> Callable[[], None]:
        """Return a call that takes so long without the interpreter's lock."""
        size = max(NO_LOCK_BYTES, int(self._slowness * seconds / self._per_byte))
        data, alone = self._room[:size], size * self._per_byte

        def run() -> None:
            began = time.perf_counter()
            zlib.crc32(data)
            self.waited += max(0.0, time.perf_counter() - began - alone)

        return run

    def python(self, seconds: float) -> Callable[[], None]:
        """Return a call that takes so long in Python, with the lock."""
        turns = int(self._slowness * seconds / self._per_turn)
        return lambda: _turn(turns)


def _turn(times: int) -> None:
    for _ in range(times):
        pass


def _best(run: Callable[[], object]) -> float:
    """Return the seconds of the quickest of some runs, as the thread has them."""
    took = []
    for _ in range(20):
        began = time.thread_time()
        run()
        took.append(time.thread_time() - began)
    return min(took)


class HostModel:
    """The model's side of a launch: shapes, and the calls that a layer takes."""

    dtype, device, hidden_size, num_layers = torch.bfloat16, torch.device("cpu"), 1, LAYERS

    def __init__(self, host: Host) -> None:
        self._python, self._launch = host.python(PYTHON_S), host.call(ATTENTION_S)

    def attention_buffers(self, rows: int) -> AttentionBuffers:
        return AttentionBuffers(torch.zeros(rows, 1), torch.zeros(rows, 1))

    def embed(self, token_ids: Tensor, embed_rows: Tensor, embeds: Tensor) -> Tensor:
        return torch.zeros(len(token_ids), 1)

    def begin(self, residual: Tensor, positions: Tensor) -> tuple[Tensor, Stream]:
        return residual, Stream(residual, residual, residual)

    def project_qkv(self, *_: object) -> None:
        """Compute nothing."""

    def attend(self, calls: Sequence[object], keys: Tensor, values: Tensor) -> None:
        for _ in calls:
            self._python()
            self._launch()

    def finish_layer(self, nth: int, attended: Tensor, stream: Stream, vision: object) -> tuple[Tensor, Stream]:
        return attended, stream

    def hidden(self, step: StepInput, cache: KVCache) -> Tensor:
        self.attend(range(LAYERS * LAUNCHES), cache.keys, cache.values)
        return torch.zeros(len(step.token_ids), 1)

    def project(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 1)


class HostRecorder:
    """Recorder of pieces, each a call."""

    def __init__(self, host: Host) -> None:
        self._replay = host.call(REPLAY_S)

    def record(self, compute: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        return compute(), self._replay


class HostGraphs(DecodeGraphs):
    """Captured decode steps, each a call."""

    def __init__(self, model: Any, cache: KVCache, rows: DecodeRows, max_num_seqs: int, host: Host) -> None:
        self._replay = host.call(REPLAY_S)
        super().__init__(model, cache, rows, max_num_seqs)

    def _capture(self, size: int) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            self._replay()
            return torch.zeros(size, 1)

        return replay


class HostDrawn:
    """Tokens that are all the same word."""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.full((rows,), WORD)

    def read(self) -> list[Sampled]:
        return [Sampled(token) for token in self.tokens.tolist()]


class HostSampler:
    """Sampler's side of a launch."""

    def __init__(self, host: Host) -> None:
        self._launch = host.call(ATTENTION_S)

    def draw(self, logits: Tensor, plan: SamplingPlan) -> HostDrawn:
        upload(list(plan.arrays().values()), HostModel.device)
        for _ in range(SAMPLING_CALLS):
            self._launch()
        return HostDrawn(len(logits))


class ClockedStep:
    """Step that is read when the device has ended it."""

    def __init__(self, inner: Launched, step: Step) -> None:
        self._inner, self._step = inner, step
        self.sample, self.scores = inner.sample, inner.scores

    def read(self) -> list[Sampled]:
        time.sleep(max(0.0, self._step.ended - time.monotonic()))
        sampled = self._inner.read()
        self._step.read = time.monotonic()
        return sampled


class ClockedRunner(ModelRunner):
    """The real runner; steps end by a clock."""

    def __init__(self, settings: EngineSettings, host: float, device: float, steps: list[Step]) -> None:
        """`host`, `device`: how slow they are, in times."""
        self._host, self._slowness, self._steps = Host(host), device, steps
        self._free = 0.0  # when the device has ended all that was launched
        config = load_model_config(Path(settings.model))
        model: Any = HostModel(self._host)
        cache = KVCache(*(torch.zeros(LAYERS, 1, settings.block_size, 1, 1) for _ in range(2)))
        rows = DecodeRows(
            model, settings.max_num_seqs, CONTEXT // settings.block_size, settings.block_size, 0, config.image_patch_id
        )
        pieces = StepPieces(
            model,
            cache,
            rows.last_tokens,
            0,
            settings.max_num_batched_tokens,
            config.image_patch_id,
            HostRecorder(self._host),
        )
        graphs = HostGraphs(model, cache, rows, settings.max_num_seqs, self._host)
        builder = StepBuilder(model, settings.block_size, config.image_patch_id)
        masks = GrammarMasks(config.vocab_size, 1)
        sampler: Any = HostSampler(self._host)
        super().__init__(model, cache, sampler, builder, masks, graphs, settings.max_num_seqs, pieces, H200)

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        last = self._steps[-1] if self._steps else None
        step = Step(time.monotonic(), rows=plan.num_tokens, tokens=len(plan.sampling), prefill=plan.kinds[1])
        step.ahead = last is not None and last.read == 0.0
        self._steps.append(step)
        self._host.waited, cpu = 0.0, time.thread_time()

        def send() -> None:
            meanwhile()
            step.sent = time.monotonic()

        inner = super().launch(plan, send)
        step.launched, step.cpu, step.waited = time.monotonic(), time.thread_time() - cpu, self._host.waited
        step.thread = cpu
        step.began = max(step.planned, self._free)
        step.ended = self._free = max(step.began + self._slowness * float(h200_ms(plan)) / 1000, step.launched)
        return ClockedStep(inner, step)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--host", type=float, default=1.0, help="time of launches, in place of the usual (%(default)s)")
    parser.add_argument("--device", type=float, default=1.0, help="time of steps, in place of an H200's (%(default)s)")
    args = parser.parse_args()
    steps: list[Step] = []

    def build(settings: EngineSettings, redis: Redis, *, tracing: object) -> Any:
        facts = EngineFacts(load_model_config(Path(settings.model)), CONTEXT, think_close_id=3)
        runner = ClockedRunner(settings, args.host, args.device, steps)
        return compose(settings, redis, facts, refuse, lambda: (runner, BLOCKS), EngineMetrics())

    status = launch("engine", EngineSettings, build, os.environ)
    args.trace.write_bytes(msgspec.json.encode(steps))
    return status


def refuse(text: str) -> Any:
    raise ValueError("no grammars here")


if __name__ == "__main__":
    sys.exit(main())
