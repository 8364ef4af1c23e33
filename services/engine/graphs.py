"""Decode steps as CUDA graphs: captured once for some batch sizes, replayed with their inputs changed in place.

A graph is a fixed list of launches on fixed addresses. A batch that is smaller than the captured size is padded with
rows of one token: they write to a block that belongs to nobody, and what comes out of them is not looked at.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.model.inputs import KVCache, StepInput
from services.engine.step import HostStep, Model

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_BYTES_PER_ROW = 5 * 8 + 4 + 1  # token, position x 3, slot; context; vision


def capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to capture, the largest last."""
    return (*(size for size in SIZES if size < max_num_seqs), max_num_seqs)


def captured_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Device memory that the graphs keep: each its logits, once in 16 and once in 32 bits."""
    return sum(capture_sizes(max_num_seqs)) * vocab_size * 6


@dataclass(frozen=True, slots=True)
class _Rows:
    """One set of arrays over the same bytes, on the host as numpy's or on the device as torch's."""

    token_ids: Tensor  # [R] int64
    positions: Tensor  # [3, R] int64
    slots: Tensor  # [R] int64
    context_lens: Tensor  # [R] int32
    vision: Tensor  # [R] bool

    @staticmethod
    def over(buffer: Tensor, rows: int) -> "_Rows":
        longs = buffer[: 5 * 8 * rows].view(torch.int64).view(5, rows)
        contexts = buffer[5 * 8 * rows : 44 * rows].view(torch.int32)
        return _Rows(longs[0], longs[1:4], longs[4], contexts, buffer[44 * rows :].view(torch.bool))


class DecodeGraphs:
    """The captured steps of one model and cache."""

    def __init__(self, model: Model, cache: KVCache, max_num_seqs: int, max_model_len: int, spare_block: int) -> None:
        """Capture. Launches of every size are compiled on the way, so this takes a while.

        Args:
            spare_block: a block of the cache that no sequence is ever given.
        """
        self._model, self._cache = model, cache
        self._sizes = capture_sizes(max_num_seqs)
        # Rows are a multiple of 8, so that every part of the buffer begins at a multiple of its element's size.
        rows = -(-max_num_seqs // 8) * 8
        self._host_bytes = torch.zeros(_BYTES_PER_ROW * rows, dtype=torch.uint8, pin_memory=True)
        self._device_bytes = self._host_bytes.to(model.device)
        self._host, self._rows = _Rows.over(self._host_bytes, rows), _Rows.over(self._device_bytes, rows)
        self._spare_slots = torch.arange(rows) % cache.block_size + spare_block * cache.block_size
        self._tables = BlockTables(rows, -(-max_model_len // cache.block_size), model.device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=model.device)
        self._logit_rows = torch.arange(rows, device=model.device)
        self._no_rows = torch.empty(0, dtype=torch.int64, device=model.device)
        self._no_embeds = torch.empty(0, model.hidden_size, dtype=model.dtype, device=model.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pad(0, rows)
        self._device_bytes.copy_(self._host_bytes)
        for size in reversed(self._sizes):
            self._graphs[size] = self._capture(size)

    def fits(self, step: HostStep) -> bool:
        """Whether a step is one that was captured: every sequence decodes, and none of its rows is media."""
        return (
            step.max_query_len == 1 and step.samples_all and not len(step.embed_rows) and len(step) <= self._sizes[-1]
        )

    def run(self, step: HostStep) -> Tensor:
        """[len(step), vocabulary] logits, valid until the next run. Returns while the device works."""
        count = len(step)
        size = next(size for size in self._sizes if size >= count)
        host = self._host
        for room, values in (
            (host.token_ids, step.token_ids),
            (host.slots, step.slots),
            (host.context_lens, step.context_lens),
            (host.vision, step.vision),
        ):
            room.numpy()[:count] = values
        host.positions.numpy()[:, :count] = step.positions
        self._pad(count, size)
        self._device_bytes.copy_(self._host_bytes, non_blocking=True)
        self._tables.update(step.blocks)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count]

    def _pad(self, start: int, stop: int) -> None:
        host = self._host
        host.token_ids[start:stop] = 0
        host.positions[:, start:stop] = 0
        host.slots[start:stop] = self._spare_slots[start:stop]
        host.context_lens[start:stop] = 1
        host.vision[start:stop] = False

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        rows = self._rows
        step = StepInput(
            token_ids=rows.token_ids[:size],
            positions=rows.positions[:, :size],
            vision=rows.vision[:size],
            embed_rows=self._no_rows,
            embeds=self._no_embeds,
            slots=rows.slots[:size],
            block_tables=self._tables.device[:size],
            query_start=self._starts[: size + 1],
            context_lens=rows.context_lens[:size],
            logit_rows=self._logit_rows[:size],
            max_query_len=1,
            max_context_len=self._tables.device.shape[1] * self._cache.block_size,
        )
        # Once for the compiler and the libraries' handles, which a capture must not meet for the first time.
        self._model.forward(step, self._cache)
        torch.cuda.synchronize(self._model.device)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self._model.forward(step, self._cache)
        return graph, logits


class BlockTables:
    """The block tables on the device, of which a step uploads only rows that have changed."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.device = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._known = [b""] * rows

    def update(self, blocks: list[bytes]) -> None:
        """
        Args:
            blocks: row r's block numbers, as int32.
        """
        known = self._known
        changed = [row for row, content in enumerate(blocks) if content != known[row]]
        if not changed:
            return
        widest = max(len(blocks[row]) for row in changed)
        parts = b"".join(blocks[row].ljust(widest, b"\0") for row in changed)
        table: NDArray[np.int32] = np.frombuffer(parts, np.int32).reshape(len(changed), -1).copy()
        rows = torch.tensor(changed).to(self.device.device)
        self.device[:, : table.shape[1]].index_copy_(0, rows, torch.from_numpy(table).to(self.device.device))
        for row in changed:
            known[row] = blocks[row]
