"""Decode steps as CUDA graphs: captured once for some batch sizes, replayed with their inputs changed in place.

A graph is a fixed list of launches on fixed addresses. A batch that is smaller than the captured size is padded with
rows of one token: they write to a block that belongs to nobody, and what comes out of them is not looked at.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from services.engine.model.inputs import KVCache
from services.engine.run.decode_rows import DecodeRows
from services.engine.run.step import HostStep, Model

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to capture, the largest last."""
    return (*(size for size in SIZES if size < max_num_seqs), max_num_seqs)


def captured_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Device memory that the graphs keep: each its logits in float32."""
    return sum(capture_sizes(max_num_seqs)) * vocab_size * 4


class DecodeGraphs:
    """The captured steps of one model and cache."""

    def __init__(self, model: Model, cache: KVCache, rows: DecodeRows, max_num_seqs: int) -> None:
        """Capture. Launches of every size are compiled on the way, so this takes a while."""
        self._model, self._cache, self._rows = model, cache, rows
        self._sizes = capture_sizes(max_num_seqs)
        self._pool: Any = None
        rows.bring(HostStep.nothing())
        self._replays = {size: self._capture(size) for size in reversed(self._sizes)}

    def fits(self, step: HostStep) -> bool:
        """Whether a step is one that was captured: every sequence decodes, and none of its rows is media."""
        return (
            step.max_query_len == 1 and step.samples_all and not len(step.embed_rows) and len(step) <= self._sizes[-1]
        )

    def run(self, step: HostStep) -> Tensor:
        """[len(step), vocabulary] logits, valid until the next run. Returns while the device works."""
        self._rows.bring(step)
        size = next(size for size in self._sizes if size >= len(step))
        return self._replays[size]()[: len(step)]

    def keep(self, tokens: Tensor) -> None:
        """
        Args:
            tokens: [R] sampled by a step, captured or not: the next one may name them.
        """
        self._rows.keep(tokens)

    def _forward(self, size: int) -> Tensor:
        return self._model.forward(self._rows.step(size), self._cache)

    def _capture(self, size: int) -> Callable[[], Tensor]:
        # Once for the compiler and the libraries' handles, which a capture must not meet for the first time.
        self._forward(size)
        torch.cuda.synchronize(self._model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(size)
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
