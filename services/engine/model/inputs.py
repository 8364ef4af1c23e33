"""Inputs of one forward step: tensors planned once on the host. Layers know nothing of scheduling."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from services.engine.kernels.reference.paged_attention import AttentionLaunch, PagedSequences


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPart(PagedSequences):
    """Sequences of a step that follow each other, and whose attention is one call. A captured step's have no lengths.

    It is complete by itself: its rows are counted from its own first one.
    """

    rows: slice  # of the step


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step over N new tokens of S sequences, packed without padding, in sequence order.

    A sequence owns successive rows; after the step its cache holds its context, of which these rows are the last.
    Slot = block * block_size + offset in the block. Rows past those of all parts are padding.
    """

    token_ids: Tensor  # [N] int64
    positions: Tensor  # [3, N] int64: t, h, w
    vision: Tensor | None  # [N] bool: routed to the vision experts; None: no row is
    embed_rows: Tensor  # [M] int64: rows of this step that are media
    embeds: Tensor  # [M, hidden] model dtype: their embeddings
    slots: Tensor  # [N] int64: slots of each row's key and value
    attention: tuple[AttentionPart, ...]
    logit_rows: Tensor | None  # [R] int64: rows whose logits are wanted; None: of all


@dataclass(frozen=True, slots=True)
class AttentionBuffers:
    """Input and output of attention: [N, heads, head_dim] each. Those of a part are for the layers of one step."""

    query: Tensor
    attended: Tensor
    launches: list[AttentionLaunch] = field(default_factory=list)  # made for the first layer, used for all

    def first(self, rows: int) -> "AttentionBuffers":
        return AttentionBuffers(self.query[:rows], self.attended[:rows])

    def of(self, part: AttentionPart) -> "AttentionBuffers":
        return AttentionBuffers(self.query[part.rows], self.attended[part.rows])


AttentionCall = tuple[AttentionPart, AttentionBuffers]  # a part of a step, and its rows


class Stream(NamedTuple):
    """Companions of a layer's input, from layer to layer."""

    cos: Tensor  # [N, head_dim / 2] float32, and so is sin
    sin: Tensor
    residual: Tensor  # [N, hidden]


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

    def clear(self) -> None:
        """Set all to zero again."""
        self.keys.zero_()
        self.values.zero_()

    @staticmethod
    def allocate(
        layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
    ) -> "KVCache":
        """Allocate the cache, zeroed, so that masked-out rows can never be NaN."""
        shape = (layers, blocks, block_size, kv_heads, head_dim)
        return KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
