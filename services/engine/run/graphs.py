"""Decode steps as CUDA graphs: captured once for some batch sizes, replayed with their inputs changed in place.

A graph is a fixed list of launches on fixed addresses. A batch smaller than the captured size is padded with rows of
one token: they write to a block that belongs to no sequence, and their logits are ignored.
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
    """Return the batch sizes to capture, the largest last."""
    return (*(size for size in SIZES if size < max_num_seqs), max_num_seqs)


def captured_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Return the device memory that the graphs keep: each its logits in float32."""
    return sum(capture_sizes(max_num_seqs)) * vocab_size * 4


class DecodeGraphs:
    """Captured decode steps of one model and cache."""

    def __init__(self, model: Model, cache: KVCache, rows: DecodeRows, max_num_seqs: int) -> None:
        """Capture. Launches of every size are compiled on the way, so this takes a while."""
        self._model, self._cache, self._rows = model, cache, rows
        self.sizes = capture_sizes(max_num_seqs)
        self._pool: Any = None
        rows.upload_step(HostStep.empty())
        self._replays = {size: self._capture(size) for size in reversed(self.sizes)}

    def captures(self, step: HostStep) -> bool:
        """Return True if a step was captured: every sequence decodes and samples, and none of its rows is media."""
        return step.max_query_len == 1 and step.samples_all and not len(step.embed_rows) and len(step) <= self.sizes[-1]

    def padded(self, count: int) -> int:
        """Return the size that so many rows of a step, at most as many as the largest, are padded to."""
        return next(size for size in self.sizes if size >= count)

    def run(self, step: HostStep) -> Tensor:
        """Return [len(step), vocabulary] logits, valid until the next run. Returns while the device computes."""
        self._rows.upload_step(step)
        return self._replays[self.padded(len(step))]()[: len(step)]

    def replay(self, rows: int) -> Tensor:
        """Compute the last step again, as one of so many rows."""
        return self._replays[self.padded(rows)]()

    def keep_tokens(self, tokens: Tensor) -> None:
        """Keep a step's tokens on the device for the next one.

        Args:
            tokens: [R] sampled by a step, captured or not.
        """
        self._rows.keep_tokens(tokens)

    def _forward(self, size: int) -> Tensor:
        return self._model.forward(self._rows.step(size), self._cache)

    def _capture(self, size: int) -> Callable[[], Tensor]:
        # Run once before: a capture must not compile kernels or create the libraries' handles.
        self._forward(size)
        torch.cuda.synchronize(self._model.device)
        graph = torch.cuda.CUDAGraph()
        # The libraries by which ranks talk have threads of their own, which may ask the device for something meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(size)
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
