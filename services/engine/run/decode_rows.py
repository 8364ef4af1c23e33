"""Inputs of a decode step at addresses that never change, which a captured graph reads.

A token that was sampled in the step before never comes to the host and back: `keep_tokens` puts a step's tokens in
front of the ids that the host uploads, and each row of the next step has the index of its own among both.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.model.inputs import AttentionPart, StepInput
from services.engine.run.step import HostStep, Model
from services.engine.run.upload import upload

_LONGS = 6  # token, source, position x 3, slot
_BYTES = _LONGS * 8 + 4  # and context, of one row


class DecodeRows:
    """Rows of one token each. Uploads are ordered by the device's stream: nothing here waits for it."""

    def __init__(
        self, model: Model, max_rows: int, blocks: int, block_size: int, spare_block: int, image_patch_id: int
    ):
        """
        Args:
            max_rows: rows of the largest step.
            blocks: of the longest context.
            spare_block: a block of the cache that no sequence is ever given.
        """
        device = model.device
        # A multiple of 8, so that every part of the buffer is aligned to its element's size, and to 16.
        self._rows = rows = -(-max_rows // 8) * 8
        self._image_patch_id = image_patch_id
        self._spare_slots = np.arange(rows) % block_size + spare_block * block_size
        self._max_context_len = blocks * block_size
        self._buffer = torch.zeros(8 * rows + _BYTES * rows, dtype=torch.uint8, device=device)
        self._ids = self._buffer[: 2 * 8 * rows].view(torch.int64)  # the last tokens sampled, and the uploaded ids
        self._uploaded = self._buffer[8 * rows :]
        self._longs = self._uploaded[: _LONGS * 8 * rows].view(torch.int64).view(_LONGS, rows)
        self._contexts = self._uploaded[_LONGS * 8 * rows :].view(torch.int32)
        self._tables = BlockTables(rows, blocks, device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._no_rows = torch.empty(0, dtype=torch.int64, device=device)
        self._no_embeds = torch.empty(0, model.hidden_size, dtype=model.dtype, device=device)

    def upload_step(self, step: HostStep) -> None:
        """Upload a step; rows after its own become rows that write to the spare block."""
        # New pinned memory: the copy out of the last step's may still be pending.
        host = torch.empty(len(self._uploaded), dtype=torch.uint8, pin_memory=self._uploaded.is_cuda)
        count, rows, room = len(step), self._rows, host.numpy()
        longs = room[: _LONGS * 8 * rows].view(np.int64).reshape(_LONGS, rows)
        contexts = room[_LONGS * 8 * rows :].view(np.int32)
        longs[:, count:] = 0
        longs[0, :count] = step.token_ids
        longs[1] = np.arange(rows, 2 * rows)
        np.copyto(longs[1, :count], step.sources, where=step.sources >= 0)
        longs[2:5, :count] = step.positions
        longs[5] = self._spare_slots
        longs[5, :count] = step.slots
        contexts[:] = 1
        contexts[:count] = step.context_lens
        self._uploaded.copy_(host, non_blocking=True)
        self._tables.update(step.blocks)

    @property
    def last_tokens(self) -> Tensor:
        """Tokens of the last step, as `keep_tokens` was told, at an address that never changes."""
        return self._ids[: self._rows]

    def keep_tokens(self, tokens: Tensor) -> None:
        """Keep the tokens of a step for the next one.

        Args:
            tokens: [R] int64 sampled by a step.
        """
        self._ids[: len(tokens)].copy_(tokens)

    def step(self, size: int) -> StepInput:
        """Return the first `size` rows. Lookups of their ids are operations of the step itself."""
        token_ids = self._ids.index_select(0, self._longs[1, :size])
        return StepInput(
            token_ids=token_ids,
            positions=self._longs[2:5, :size],
            vision=token_ids >= self._image_patch_id,
            embed_rows=self._no_rows,
            embeds=self._no_embeds,
            slots=self._longs[5, :size],
            attention=(self._attention(size),),
            logit_rows=None,
        )

    def _attention(self, size: int) -> AttentionPart:
        return AttentionPart(
            rows=slice(0, size),
            block_tables=self._tables.device[:size],
            query_start=self._starts[: size + 1],
            context_lens=self._contexts[:size],
            max_query_len=1,
            max_context_len=self._max_context_len,
        )


class BlockTables:
    """Block tables on the device; a step uploads only the rows that have changed."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.device = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._known = [b""] * rows

    def update(self, blocks: list[bytes]) -> None:
        """Upload the rows that have changed.

        Args:
            blocks: row r's block numbers, as int32.
        """
        known = self._known
        changed = [row for row, content in enumerate(blocks) if content != known[row]]
        if not changed:
            return
        widest = max(len(blocks[row]) for row in changed)
        parts = b"".join(blocks[row].ljust(widest, b"\0") for row in changed)
        table: NDArray[np.int32] = np.frombuffer(parts, np.int32).reshape(len(changed), -1)
        rows, moved = upload([np.array(changed), table], self.device.device)
        self.device[:, : table.shape[1]].index_copy_(0, rows, moved)
        for row in changed:
            known[row] = blocks[row]
