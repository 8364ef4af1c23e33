"""Drives a model step by step through a paged cache with shuffled blocks, as a scheduler would."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.engine.model.ernie import ErnieModel
from services.engine.model.inputs import AttentionPart, KVCache, StepInput

BLOCK_SIZE = 4


@dataclass
class Paged:
    """One sequence: all its tokens from the start, and how many the cache holds."""

    ids: list[int]
    positions: Tensor  # [3, tokens]
    embeds: dict[int, Tensor] = field(default_factory=dict)  # by token offset
    table: list[int] = field(default_factory=list)
    computed: int = 0


class Driver:
    def __init__(self, model: ErnieModel, blocks: int = 64) -> None:
        self.model = model
        config = model.config
        self.cache = KVCache.allocate(
            config.num_layers, blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim, model.dtype, "cpu"
        )
        # A slot that was not written must not matter, whatever it holds.
        self.cache.keys.fill_(50)
        self.cache.values.fill_(50)
        order = torch.Generator().manual_seed(1)
        self._free: list[int] = torch.randperm(blocks, generator=order).tolist()

    def step(self, work: Sequence[tuple[Paged, int]], logit_rows: Sequence[int] | None = None) -> list[Tensor]:
        """Advance each sequence by so many tokens. Logits of all its new rows for each, or, with `logit_rows`, one
        tensor of those rows."""
        logits = self.model.forward(self.plan(work, logit_rows), self.cache)
        for sequence, count in work:
            sequence.computed += count
        return [logits] if logit_rows is not None else list(logits.split([count for _, count in work]))

    def run(self, sequence: Paged, chunk: int) -> Tensor:
        """All of a sequence alone: logits of every token."""
        rows = []
        while sequence.computed < len(sequence.ids):
            rows += self.step([(sequence, min(chunk, len(sequence.ids) - sequence.computed))])
        return torch.cat(rows)

    def plan(self, work: Sequence[tuple[Paged, int]], logit_rows: Sequence[int] | None) -> StepInput:
        ids: list[int] = []
        columns, slots, rows, embeds, starts = [], [], [], [], [0]
        for sequence, count in work:
            for token in range(sequence.computed, sequence.computed + count):
                if token == len(sequence.table) * BLOCK_SIZE:
                    sequence.table.append(self._free.pop())
                if token in sequence.embeds:
                    rows.append(len(ids))
                    embeds.append(sequence.embeds[token])
                ids.append(sequence.ids[token])
                columns.append(sequence.positions[:, token])
                slots.append(sequence.table[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE)
            starts.append(len(ids))
        width = max(len(sequence.table) for sequence, _ in work) + 1
        contexts = [sequence.computed + count for sequence, count in work]
        token_ids, hidden = torch.tensor(ids), self.model.config.hidden_size
        return StepInput(
            token_ids=token_ids,
            positions=torch.stack(columns, 1).long(),
            vision=token_ids >= self.model.config.image_patch_id,
            embed_rows=torch.tensor(rows, dtype=torch.long),
            embeds=torch.stack(embeds).to(self.model.dtype) if embeds else torch.empty(0, hidden).to(self.model.dtype),
            slots=torch.tensor(slots),
            attention=(
                AttentionPart(
                    rows=slice(0, len(ids)),
                    block_tables=torch.tensor(
                        [sequence.table + [0] * (width - len(sequence.table)) for sequence, _ in work],
                        dtype=torch.int32,
                    ),
                    query_start=torch.tensor(starts, dtype=torch.int32),
                    context_lens=torch.tensor(contexts, dtype=torch.int32),
                    max_query_len=max(count for _, count in work),
                    max_context_len=max(contexts),
                ),
            ),
            logit_rows=torch.arange(len(ids)) if logit_rows is None else torch.tensor(logit_rows, dtype=torch.long),
        )
