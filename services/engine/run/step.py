"""A plan as arrays: the step's inputs, built on the host and moved to the device once each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.model.inputs import (
    AttentionBuffers,
    AttentionCall,
    AttentionPart,
    KVCache,
    StepInput,
    Stream,
)
from services.engine.run.attention_parts import attention_parts
from services.engine.run.upload import upload
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.plan import Chunk, Plan

EMBED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Ints = NDArray[np.int64]


class Model(Protocol):
    """Interface of the model that runs a step: see `services.engine.model.ernie.ErnieModel`."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    def forward(self, step: StepInput, cache: KVCache) -> Tensor: ...

    def hidden(self, step: StepInput, cache: KVCache) -> Tensor: ...

    def project(self, x: Tensor) -> Tensor: ...

    def attention_buffers(self, rows: int) -> AttentionBuffers: ...

    def embed(self, token_ids: Tensor, embed_rows: Tensor, embeds: Tensor) -> Tensor: ...

    def begin(self, residual: Tensor, positions: Tensor) -> tuple[Tensor, Stream]: ...

    def project_qkv(
        self, nth: int, x: Tensor, stream: Stream, slots: Tensor, cache: KVCache, query: Tensor
    ) -> None: ...

    def attend(self, calls: Sequence[AttentionCall], keys: Tensor, values: Tensor) -> None: ...

    def finish_layer(
        self, nth: int, attended: Tensor, stream: Stream, vision: Tensor | None
    ) -> tuple[Tensor, Stream]: ...


@dataclass(frozen=True, slots=True)
class HostStep:
    """Inputs of a step on the host: the fields of a StepInput of the same names, as arrays, and its sequences'
    blocks."""

    token_ids: Ints  # [N]; 0 for those in flight
    sources: Ints  # [S] index of the row's id among the tokens that the last step samples; -1: token_ids has it
    positions: Ints  # [3, N]
    vision: NDArray[np.bool_]  # [N]
    embed_rows: Ints  # [M]
    embeds: Tensor  # [M, hidden] model dtype, on the host, pinned if a GPU is to copy them
    slots: Ints  # [N]
    blocks: list[bytes]  # [S] block numbers of each sequence, as int32
    query_start: NDArray[np.int32]  # [S + 1]
    context_lens: NDArray[np.int32]  # [S]
    logit_rows: Ints  # [R]
    max_query_len: int

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.blocks)

    @property
    def samples_all(self) -> bool:
        return len(self.logit_rows) == len(self.blocks)

    @property
    def has_in_flight(self) -> bool:
        return bool((self.sources >= 0).any())

    def padded(self, rows: int, spare_block: int, block_size: int) -> "HostStep":
        """Return the step with rows behind its own, up to `rows`, that belong to no sequence.

        Args:
            spare_block: a block of the cache that no sequence is ever given.
        """
        missing = rows - len(self.token_ids)
        slots = np.arange(missing) % block_size + spare_block * block_size
        return replace(
            self,
            token_ids=np.pad(self.token_ids, (0, missing)),
            positions=np.pad(self.positions, ((0, 0), (0, missing))),
            vision=np.pad(self.vision, (0, missing)),
            slots=np.concatenate([self.slots, slots]),
        )

    def media(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move the rows that are media, and their embeddings, to a device."""
        (rows,) = upload([self.embed_rows], device)
        return rows, self.embeds.to(device, non_blocking=True)

    def to(
        self, device: torch.device, block_size: int, last_tokens: Tensor | None = None, image_patch_id: int = 0
    ) -> StepInput:
        """Move the step to a device.

        Args:
            last_tokens: sampled by the last step, on the device, if the step has tokens in flight; then the ids from
                `image_patch_id` on are the vision experts'.
        """
        arrays: dict[str, NDArray[Any]] = {
            "token_ids": self.token_ids,
            "positions": self.positions,
            "embed_rows": self.embed_rows,
            "slots": self.slots,
            "logit_rows": self.logit_rows,
        }
        if self.vision.any():
            arrays["vision"] = self.vision
        moved: dict[str, Any] = dict(zip(arrays, upload(list(arrays.values()), device), strict=True))
        if self.has_in_flight:
            assert last_tokens is not None, "the id of a row is still in flight"
            fill_in_flight(moved["token_ids"], self, last_tokens)
            moved["vision"] = moved["token_ids"] >= image_patch_id
        return StepInput(
            **{"vision": None} | moved,
            embeds=self.embeds.to(device, non_blocking=True),
            attention=self.attention(device, block_size),
        )

    def attention(self, device: torch.device, block_size: int) -> tuple[AttentionPart, ...]:
        """Move what attention needs to a device."""
        return attention_parts(self.blocks, self.query_start, self.context_lens, block_size, device)

    @staticmethod
    def empty() -> "HostStep":
        """Return a step without sequences."""
        no_ids, no_numbers = np.empty(0, np.int64), np.empty(0, np.int32)
        return HostStep(
            token_ids=no_ids,
            sources=no_ids,
            positions=np.empty((3, 0), np.int64),
            vision=np.empty(0, np.bool_),
            embed_rows=no_ids,
            embeds=torch.empty(0, 0),
            slots=no_ids,
            blocks=[],
            query_start=np.zeros(1, np.int32),
            context_lens=no_numbers,
            logit_rows=no_ids,
            max_query_len=0,
        )


class StepBuilder:
    """Builder of the steps of one model and cache."""

    def __init__(self, model: Model, block_size: int, image_patch_id: int) -> None:
        self._hidden_size, self._dtype, self._device = model.hidden_size, model.dtype, model.device
        self._block_size = block_size
        self._image_patch_id = image_patch_id

    def build(self, plan: Plan) -> HostStep:
        chunks = plan.parts
        decodes = next((n for n, chunk in enumerate(chunks) if not _decodes(chunk)), len(chunks))
        if decodes == len(chunks):
            return self._decode(chunks)
        mixed = self._mixed(chunks[decodes:])
        return _joined(self._decode(chunks[:decodes]), mixed) if decodes else mixed

    def _decode(self, chunks: tuple[Chunk, ...]) -> HostStep:
        """Build a step with one token each of sequences past their prompts: most of all chunks, so in few passes."""
        size = self._block_size
        sources = np.array([-1 if c.source is None else c.source for c in chunks], np.int64)
        ids = [c.sequence.tokens[c.start] if c.source is None else 0 for c in chunks]
        token_ids = np.array(ids, np.int64)
        # All three axes of a generated token's position are the same.
        positions = np.array([c.sequence.next_position + c.start - c.sequence.prompt_len for c in chunks], np.int64)
        starts = np.arange(len(chunks) + 1)
        return HostStep(
            token_ids=token_ids,
            sources=sources,
            positions=np.broadcast_to(positions, (3, len(chunks))).copy(),
            vision=token_ids >= self._image_patch_id,
            embed_rows=np.empty(0, np.int64),
            embeds=torch.empty(0, self._hidden_size, dtype=self._dtype),
            slots=np.array([c.sequence.blocks[c.start // size] * size + c.start % size for c in chunks], np.int64),
            blocks=[c.sequence.blocks.tobytes() for c in chunks],
            query_start=starts.astype(np.int32),
            context_lens=np.array([c.start + 1 for c in chunks], np.int32),
            logit_rows=np.array([row for row, c in enumerate(chunks) if c.samples], np.int64),
            max_query_len=1,
        )

    def _mixed(self, chunks: tuple[Chunk, ...]) -> HostStep:
        lengths = [chunk.length for chunk in chunks]
        starts = np.cumsum([0, *lengths])
        no_id = np.zeros(1, np.int64)
        token_ids = np.concatenate([c.sequence.tokens[c.start : c.stop] if c.source is None else no_id for c in chunks])
        rows, embeds = self._embeds(chunks, starts)
        return HostStep(
            token_ids=token_ids,
            sources=np.array([-1 if c.source is None else c.source for c in chunks], np.int64),
            positions=np.concatenate([c.sequence.positions(c.start, c.start + c.length) for c in chunks], axis=1),
            vision=token_ids >= self._image_patch_id,
            embed_rows=rows,
            embeds=embeds,
            slots=np.concatenate([slots(chunk, self._block_size) for chunk in chunks]),
            blocks=[chunk.sequence.blocks.tobytes() for chunk in chunks],
            query_start=starts.astype(np.int32),
            context_lens=np.array([chunk.start + chunk.length for chunk in chunks], np.int32),
            logit_rows=np.array([stop - 1 for c, stop in zip(chunks, starts[1:], strict=True) if c.samples], np.int64),
            max_query_len=max(lengths),
        )

    def _embeds(self, chunks: tuple[Chunk, ...], starts: Ints) -> tuple[Ints, Tensor]:
        """Return the rows of the step that are media, and their embeddings, [M, hidden]."""
        rows: list[Ints] = [np.empty(0, np.int64)]
        parts: list[tuple[Embeds, int]] = []  # with the first row of each that is this step's
        for chunk, first_row in zip(chunks, starts, strict=False):
            stop = chunk.start + chunk.length
            for index, span in enumerate(chunk.sequence.spans):
                begin, end = max(chunk.start, span.offset), min(stop, span.offset + span.length)
                if begin < end:
                    rows.append(np.arange(begin, end) - chunk.start + first_row)
                    parts.append((chunk.sequence.embeds[index], begin - span.offset))
        ends = np.cumsum([len(part) for part in rows]).tolist()
        embeds = self._allocate_embeds(ends[-1])
        for (stored, start), begin, end in zip(parts, ends, ends[1:], strict=False):
            copy_rows(stored, start, embeds[begin:end])
        return np.concatenate(rows), embeds

    def _allocate_embeds(self, rows: int) -> Tensor:
        """Allocate [rows, hidden], pinned for a GPU. For a prompt of images this is most of a step: written once,
        copied without a wait."""
        pinned = rows > 0 and self._device.type == "cuda"
        return torch.empty(rows, self._hidden_size, dtype=self._dtype, pin_memory=pinned)


def _decodes(chunk: Chunk) -> bool:
    """Return True for one token of a sequence past its prompt."""
    return chunk.length == 1 and chunk.start >= chunk.sequence.prompt_len


def _joined(first: HostStep, second: HostStep) -> HostStep:
    """Return the step of the sequences of two, of which the first has no media."""
    rows = len(first.token_ids)
    return HostStep(
        token_ids=np.concatenate([first.token_ids, second.token_ids]),
        sources=np.concatenate([first.sources, second.sources]),
        positions=np.concatenate([first.positions, second.positions], axis=1),
        vision=np.concatenate([first.vision, second.vision]),
        embed_rows=second.embed_rows + rows,
        embeds=second.embeds,
        slots=np.concatenate([first.slots, second.slots]),
        blocks=first.blocks + second.blocks,
        query_start=np.concatenate([first.query_start, second.query_start[1:] + np.int32(rows)]),
        context_lens=np.concatenate([first.context_lens, second.context_lens]),
        logit_rows=np.concatenate([first.logit_rows, second.logit_rows + rows]),
        max_query_len=max(first.max_query_len, second.max_query_len),
    )


def fill_in_flight(token_ids: Tensor, step: HostStep, last_tokens: Tensor) -> None:
    """Write the ids of the rows whose tokens the last step samples.

    Args:
        token_ids: [N], as the host knows them.
        last_tokens: on the device.
    """
    sequences = np.flatnonzero(step.sources >= 0)
    if len(sequences):
        rows, sources = upload(
            [step.query_start[sequences].astype(np.int64), step.sources[sequences]], token_ids.device
        )
        token_ids.index_copy_(0, rows, last_tokens.index_select(0, sources))


def slots(chunk: Chunk, block_size: int) -> Ints:
    """Return [length] slots of the keys and values of a chunk's tokens."""
    at = np.arange(chunk.start, chunk.start + chunk.length)
    blocks = np.frombuffer(chunk.sequence.blocks, np.int32)
    return blocks[at // block_size].astype(np.int64) * block_size + at % block_size


def copy_rows(stored: Embeds, start: int, target: Tensor) -> None:
    """Fill target [rows, hidden] with rows of stored embeddings from `start` on."""
    dtype, (rows, width) = EMBED_DTYPES[stored.dtype], target.shape
    row_bytes = width * dtype.itemsize
    data = np.frombuffer(stored.data, np.uint8, rows * row_bytes, start * row_bytes)
    if dtype == target.dtype:
        target.view(torch.uint8).numpy().reshape(-1)[:] = data
    else:
        target.copy_(torch.from_numpy(data.copy()).view(dtype).view(rows, width))
