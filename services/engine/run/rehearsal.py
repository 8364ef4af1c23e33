"""Rehearsal of steps before the first request: a few are computed as they will be. Before these, on a GPU every kernel
that traffic can meet is compiled and loaded, every plan of a library is made, and the time of steps is measured.

Kernels differ by classes of shapes, not by shapes: docs/notebook/engine.md names them. So a few steps meet all classes
that depend on the number of rows, and one layer's attention, which takes no time, meets those of sequences one by one.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from services.engine.kernels.reference.paged_attention import MIN_PROMPT
from services.engine.model.inputs import KVCache
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.pieces import ALIGNMENT, StepPieces, captured_sizes
from services.engine.run.runner import ModelRunner
from services.engine.run.sampling_plan import SamplingPlan
from services.engine.run.step import HostStep, Model
from services.engine.schedule.step_times import DecodeTimes, StepTimes
from shared.model.config import ModelConfig

# Prompts that are computed: so many random tokens choose nearly all experts, whose weights a CPU reads then.
STEPS, ROWS = 3, 64
REPEATS = 3  # of a measured step
PLANNED = 64  # tokens between lengths of prompts that are tried: no two plans of the library are closer
CHUNK = 2  # tokens: the fewest that are computed as a chunk
# Tiles of chunks have one of three shapes, by the length of the longest chunk, the context, and how the sequences fill
# the device. A launch for one chunk, planned as if it were so long, has each of them on every device.
PLANNED_CHUNKS = (CHUNK, 65, 2049)
DECODING, DECODING_CONTEXT = 64, 4096  # sequences, and tokens of each: so many that the device is what takes time


class InventedSteps:
    """Maker of steps of invented sequences: only shapes matter, and that tokens are spread out. No block is in use."""

    def __init__(self, model: Model, cache: KVCache, config: ModelConfig) -> None:
        self._model, self._cache = model, cache
        self._random = np.random.default_rng(0)
        # Media visit experts of their own, and most steps have none.
        self._text_ids = min(config.vocab_size, config.image_patch_id)

    def step(self, lengths: list[tuple[int, int]], media: bool = False) -> HostStep:
        """Make a step of sequences with so many new tokens, and so many in all. `media`: the first row is media."""
        size, model = self._cache.block_size, self._model
        at = np.concatenate([np.arange(context - new, context) for new, context in lengths])
        ends = np.cumsum([0, *(-(-context // size) for _, context in lengths)]).tolist()
        blocks = [np.arange(first, stop) % self._cache.num_blocks for first, stop in pairwise(ends)]
        own = [table[place // size] for table, (new, context) in zip(blocks, lengths, strict=True)
               for place in (np.arange(context - new, context),)]  # fmt: skip
        starts = np.cumsum([0, *(new for new, _ in lengths)])
        embeds = torch.zeros(int(media), model.hidden_size, dtype=model.dtype)
        return HostStep(
            token_ids=self._random.integers(0, self._text_ids, len(at)),
            sources=np.full(len(lengths), -1),
            positions=np.broadcast_to(at, (3, len(at))).copy(),
            vision=np.zeros(len(at), np.bool_),
            embed_rows=np.arange(len(embeds)),
            embeds=embeds.pin_memory() if model.device.type == "cuda" else embeds,
            slots=np.concatenate(own) * size + at % size,
            blocks=[table.astype(np.int32).tobytes() for table in blocks],
            query_start=starts.astype(np.int32),
            context_lens=np.array([context for _, context in lengths], np.int32),
            logit_rows=starts[1:] - 1,
            max_query_len=max(new for new, _ in lengths),
        )


class Rehearsal:
    """Rehearsal of one engine's steps on a GPU."""

    def __init__(self, model: Model, cache: KVCache, pieces: StepPieces, config: ModelConfig, max_seqs: int) -> None:
        self._model, self._cache, self._pieces, self._max_seqs = model, cache, pieces, max_seqs
        self.step = InventedSteps(model, cache, config).step

    def run(self, max_rows: int, max_context: int) -> StepTimes:
        """Rehearse steps of up to `max_rows` rows; return the time of those with prefill, by their number of rows."""
        for lengths in self._attentions(max_rows, max_context):
            self._attend(lengths)
        for planned in planned_chunks(min(max_rows, max_context)):
            self._attend([(CHUNK, CHUNK)], planned)
        self._pieces.hidden(self.step([(min(16, max_rows), min(16, max_rows))], media=True))
        sizes = captured_sizes(max_rows)  # whether they were captured or not
        times = {size: self._measure(size) for size in (*sizes, *larger_sizes(sizes[-1], max_rows))}
        slowest = np.maximum.accumulate(list(times.values())).tolist()
        return StepTimes(tuple(times), tuple(slowest), self._measure_cached(max_rows, max_context))

    def measure_decodes(self, graphs: DecodeGraphs, max_rows: int, ms_per_cached_token: float) -> DecodeTimes:
        """Measure captured decode steps of up to `max_rows` rows, each of which chooses experts of its own."""
        sizes = [size for size in graphs.sizes if size <= max_rows]
        times = []
        for size in sizes:
            graphs.run(self.step([(1, 1)] * size))
            times.append(measure_ms(lambda size=size: graphs.replay(size)))  # type: ignore[misc]
        quickest = np.minimum.accumulate(times[::-1])[::-1].tolist()  # a size may have been measured beside other work
        return DecodeTimes(tuple(sizes), tuple(quickest), ms_per_cached_token)

    def _attentions(self, max_rows: int, max_context: int) -> Iterator[list[tuple[int, int]]]:
        """Yield sequences of every class that attention knows."""
        for count in range(1, min(self._max_seqs, max_rows) + 1):
            yield [(1, min(40, max_context))] * count
            if count + CHUNK <= max_rows:
                yield [(1, min(40, max_context))] * count + [(CHUNK, CHUNK)]
        longest = min(max_rows, max_context)
        for length in range(MIN_PROMPT, longest + 1, PLANNED):
            yield [(length, length)]

    def _attend(self, lengths: list[tuple[int, int]], planned: int = 0) -> None:
        """Run the first layer's attention alone.

        Args:
            planned: new tokens of a sequence, at most, for which launches are planned; 0: those of the longest.
        """
        step, model = self.step(lengths), self._model
        heads = model.attention_buffers(len(step.token_ids))
        parts = step.attention(model.device, self._cache.block_size)
        calls = [(replace(part, max_query_len=planned or part.max_query_len), heads.of(part)) for part in parts]
        model.attend(calls, self._cache.keys[0], self._cache.values[0])

    def _measure(self, rows: int) -> float:
        """Return the median milliseconds of a step with one prompt of so many tokens."""
        step = self.step([(rows, rows)])
        return measure_ms(lambda: self._model.project(self._pieces.hidden(step)[-1:]))

    def _measure_cached(self, max_rows: int, max_context: int) -> float:
        """Return the milliseconds that a step takes longer for each token in the cache of a sequence that decodes."""
        count, context = min(DECODING, self._max_seqs, max_rows), min(DECODING_CONTEXT, max_context)
        step, model = self.step([(1, context)] * count), self._model
        heads = model.attention_buffers(count)
        calls = [(part, heads.of(part)) for part in step.attention(model.device, self._cache.block_size)]

        def attend() -> None:
            for keys, values in zip(self._cache.keys, self._cache.values, strict=True):
                model.attend(calls, keys, values)

        return measure_ms(attend) / (count * context)


def compute_steps(runner: ModelRunner, config: ModelConfig, longest: int) -> None:
    """Compute a few steps, of `longest` tokens at most: the first touch memory and most experts for the first time, or
    make the allocator of a GPU ask for its first blocks.

    What they leave in the cache is finite, as all that is masked must be. On a CPU the rest of it stays untouched, and
    takes no memory yet.
    """
    steps = InventedSteps(runner.model, runner.cache, config)
    rows = max(1, min(ROWS, longest - 1))
    for lengths in (*[[(rows, rows)]] * STEPS, [(1, rows + 1)]):
        runner.draw(runner.logits(steps.step(lengths)), SamplingPlan()).read()


def planned_chunks(longest: int) -> tuple[int, ...]:
    """Return the lengths for which to plan, to meet every shape of tiles that chunks of up to `longest` tokens have.
    Many chunks at once have that of longer ones."""
    return PLANNED_CHUNKS if longest >= PLANNED_CHUNKS[1] else PLANNED_CHUNKS[:1] if longest >= CHUNK else ()


def larger_sizes(captured: int, max_rows: int) -> list[int]:
    """Return numbers of rows beyond those captured that meet every class of kernels, the largest last."""
    sizes, size = [], captured + ALIGNMENT
    while size < max_rows:
        sizes.append(size)
        size = 2 * size // ALIGNMENT * ALIGNMENT
    return [*sizes, max_rows] if max_rows > captured else sizes


def measure_ms(run: Callable[[], object]) -> float:
    """Return the median milliseconds of a step after another one. The host launches it while the device still computes
    the one before, as the engine does."""
    run()
    if not torch.cuda.is_available():
        return 0.0
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for ended in events[1:]:
        run()
        ended.record()
    events[-1].synchronize()
    return float(statistics.median(started.elapsed_time(ended) for started, ended in pairwise(events)))
