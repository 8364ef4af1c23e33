"""Inputs of one forward step: tensors planned once on the host. Layers know nothing of scheduling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.kernels.reference.paged_attention import Lengths


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step over N new tokens of S sequences, packed without padding, in sequence order.

    Sequence s owns rows [query_start[s], query_start[s+1]); after the step its cache holds context_lens[s] tokens, of
    which these rows are the last. Slot = block * block_size + offset in the block.
    """

    token_ids: Tensor  # [N] int64
    positions: Tensor  # [3, N] int64: t, h, w
    vision: Tensor | None  # [N] bool: routed to the vision experts; None: no row is
    embed_rows: Tensor  # [M] int64: rows of this step that are media
    embeds: Tensor  # [M, hidden] model dtype: their embeddings
    slots: Tensor  # [N] int64: slots of each row's key and value
    block_tables: Tensor  # [S, B] int32, padded with 0
    query_start: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32
    logit_rows: Tensor | None  # [R] int64: rows whose logits are wanted; None: of all
    max_query_len: int
    max_context_len: int
    lengths: Lengths = ()  # of each sequence, as known to the host; () in a captured step


@dataclass(frozen=True, slots=True)
class KVCache:
    """The paged cache: one tensor of keys and one of values for all layers."""

    keys: Tensor  # [layers, blocks, block_size, kv_heads, head_dim]
    values: Tensor  # the same

    @property
    def block_size(self) -> int:
        return int(self.keys.shape[2])

    @property
    def num_blocks(self) -> int:
        return int(self.keys.shape[1])

    @staticmethod
    def allocate(
        layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
    ) -> "KVCache":
        """Allocate the cache, zeroed, so that masked-out rows can never be NaN."""
        shape = (layers, blocks, block_size, kv_heads, head_dim)
        return KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
