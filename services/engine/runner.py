"""Carries out a plan: builds the step's tensors, runs the model, samples.

`Runner` is the engine's one seam to the machine it runs on: whatever has this method can stand in for the model.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.model.inputs import KVCache, StepInput
from services.engine.sampler import Sampled, Sampler
from services.engine.sampling import plan_sampling
from services.engine.scheduler import Chunk, Plan
from services.engine.sequence import Embeds, Sequence

EMBED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Runner(Protocol):
    """Executes plans, in the order they were made."""

    def execute(self, plan: Plan) -> list[Sampled]:
        """One token for each of `plan.sampling`, in its order; the sequences themselves are left alone."""


class Model(Protocol):
    """What runs a step: see `services.engine.model.ernie.ErnieModel`."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, step: StepInput, cache: KVCache) -> Tensor: ...


class ModelRunner:
    """The runner that computes."""

    def __init__(self, model: Model, cache: KVCache, sampler: Sampler, image_patch_id: int, hidden_size: int) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._image_patch_id = image_patch_id
        self._hidden_size = hidden_size

    def execute(self, plan: Plan) -> list[Sampled]:
        logits = self._model.forward(self._step_input(plan), self._cache)
        sequences = plan.sampling
        return self._sampler.sample(logits, plan_sampling(sequences)) if sequences else []

    def _step_input(self, plan: Plan) -> StepInput:
        chunks, block_size = plan.chunks, self._cache.block_size
        lengths = [chunk.length for chunk in chunks]
        starts = np.cumsum([0, *lengths])
        contexts = [chunk.start + chunk.length for chunk in chunks]
        token_ids = np.concatenate([c.sequence.tokens[c.start : c.start + c.length] for c in chunks])
        positions = np.concatenate([c.sequence.positions(c.start, c.start + c.length) for c in chunks], axis=1)
        rows, embeds = self._embeds(chunks, starts)
        return StepInput(
            token_ids=self._move(token_ids),
            positions=self._move(positions),
            vision=self._move(token_ids >= self._image_patch_id),
            embed_rows=self._move(rows),
            embeds=embeds.to(self._model.device, self._model.dtype),
            slots=self._move(np.concatenate([slots(chunk, block_size) for chunk in chunks])),
            block_tables=self._move(block_tables([chunk.sequence for chunk in chunks], max(contexts), block_size)),
            query_start=self._move(starts.astype(np.int32)),
            context_lens=self._move(np.array(contexts, np.int32)),
            logit_rows=self._move(
                np.array([stop - 1 for c, stop in zip(chunks, starts[1:], strict=True) if c.samples], np.int64)
            ),
            max_query_len=max(lengths),
            max_context_len=max(contexts),
        )

    def _embeds(self, chunks: tuple[Chunk, ...], starts: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        """Which rows of the step are media, and their embeddings, [M, hidden]."""
        rows: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        parts = [torch.empty(0, self._hidden_size, dtype=self._model.dtype)]
        for chunk, first_row in zip(chunks, starts, strict=False):
            stop = chunk.start + chunk.length
            for span, stored in zip(chunk.sequence.spans, chunk.sequence.embeds, strict=True):
                begin, end = max(chunk.start, span.offset), min(stop, span.offset + span.length)
                if begin < end:
                    rows.append(np.arange(begin, end) - chunk.start + first_row)
                    part = embed_rows(stored, self._hidden_size, begin - span.offset, end - span.offset)
                    parts.append(part.to(self._model.dtype))
        return np.concatenate(rows), torch.cat(parts)

    def _move(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._model.device)


def slots(chunk: Chunk, block_size: int) -> NDArray[np.int64]:
    """[length] where the keys and values of a chunk's tokens go."""
    at = np.arange(chunk.start, chunk.start + chunk.length)
    blocks = np.frombuffer(chunk.sequence.blocks, np.int32)
    return blocks[at // block_size].astype(np.int64) * block_size + at % block_size


def block_tables(sequences: list[Sequence], longest: int, block_size: int) -> NDArray[np.int32]:
    """[S, blocks of the longest context] padded with 0."""
    tables = np.zeros((len(sequences), -(-longest // block_size)), np.int32)
    for table, sequence in zip(tables, sequences, strict=True):
        used = np.frombuffer(sequence.blocks, np.int32)[: len(table)]
        table[: len(used)] = used
    return tables


def embed_rows(stored: Embeds, hidden_size: int, start: int, stop: int) -> Tensor:
    """[stop - start, hidden] of stored embeddings, in their dtype. Only these rows are copied."""
    dtype = EMBED_DTYPES[stored.dtype]
    row_bytes = hidden_size * dtype.itemsize
    data = np.frombuffer(stored.data, np.uint8)[start * row_bytes : stop * row_bytes].copy()
    return torch.from_numpy(data).view(dtype).view(stop - start, hidden_size)
