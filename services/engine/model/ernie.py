"""The decoder: one step over the new tokens of many sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.model.inputs import AttentionBuffers, AttentionCall, KVCache, StepInput, Stream
from shared.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: Tensor  # [hidden]
    qkv: Weight  # [(heads + 2 kv_heads) head_dim, hidden]: queries, keys, values
    out: Weight  # [hidden, heads head_dim]
    mlp_norm: Tensor  # [hidden]
    mlp: SwiGLU | MoE


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the decoder, on one device, in one dtype but for the routers and quantised projections."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocabulary, hidden]; the same tensor as `embedding` when tied


class ErnieModel:
    """The decoder's forward pass: computes logits and fills the cache. Keeps no state of any request.

    `forward` is a whole step. It consists of pieces between which attention stands, the one part whose shape depends on
    the sequences of a step and not on the number of its rows; `services.engine.run.pieces` captures those.
    """

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self._ops = ops
        self._frequencies, self._axes = rotary_plan(config, weights.norm.device)
        self._scale = config.head_dim**-0.5

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations, of the cache and of the embeddings in a StepInput."""
        return self.weights.norm.dtype

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.weights.norm.device

    @torch.no_grad()
    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Run one step, writing its rows' keys and values to the cache.

        Returns:
            [R, vocabulary] float32, one row for each of step.logit_rows.
        """
        x = self.hidden(step, cache)
        return self.project(x if step.logit_rows is None else x[step.logit_rows])

    @torch.no_grad()
    def hidden(self, step: StepInput, cache: KVCache) -> Tensor:
        """Run one step up to its logits: return [N, hidden], normed."""
        heads = self.attention_buffers(len(step.token_ids))
        x, stream = self.begin(self.embed(step.token_ids, step.embed_rows, step.embeds), step.positions)
        calls = [(part, heads.of(part)) for part in step.attention]
        for nth in range(self.num_layers):
            self.project_qkv(nth, x, stream, step.slots, cache, heads.query)
            self.attend(calls, cache.keys[nth], cache.values[nth])
            x, stream = self.finish_layer(nth, heads.attended, stream, step.vision)
        return x

    @property
    def num_layers(self) -> int:
        return len(self.weights.layers)

    def attention_buffers(self, rows: int) -> AttentionBuffers:
        """Allocate the queries and the results of attention of so many rows. The results are zero: attention leaves
        those of padding as they are."""
        shape = rows, self.config.num_heads, self.config.head_dim
        query, attended = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return AttentionBuffers(query, attended)

    @torch.no_grad()
    def embed(self, token_ids: Tensor, embed_rows: Tensor, embeds: Tensor) -> Tensor:
        """Return the residual stream before the first layer, [N, hidden]; see StepInput."""
        return self._ops.embed(self.weights.embedding, token_ids, embed_rows, embeds)

    @torch.no_grad()
    def begin(self, residual: Tensor, positions: Tensor) -> tuple[Tensor, Stream]:
        """Return the first layer's input, and what goes along with it."""
        cos, sin = self._ops.rotary_tables(positions, self._frequencies, self._axes)
        x = self._ops.rms_norm(residual, self.weights.layers[0].attention_norm, self.config.norm_eps)
        return x, Stream(cos, sin, residual)

    @torch.no_grad()
    def project_qkv(self, nth: int, x: Tensor, stream: Stream, slots: Tensor, cache: KVCache, query: Tensor) -> None:
        """Write the queries of a layer, and its keys and values into the cache."""
        layer, keys, values = self.weights.layers[nth], cache.keys[nth], cache.values[nth]
        self._ops.qkv(x, layer.qkv, stream.cos, stream.sin, keys, values, slots, query)

    @torch.no_grad()
    def attend(self, calls: Sequence[AttentionCall], keys: Tensor, values: Tensor) -> None:
        """Write the results of a layer's attention, but for the rows of padding.

        Args:
            keys, values: of the layer, [blocks, block_size, kv_heads, head_dim].
        """
        for part, heads in calls:
            self._ops.paged_attention(heads.query, keys, values, part, self._scale, heads.attended, heads.launches)

    @torch.no_grad()
    def finish_layer(self, nth: int, attended: Tensor, stream: Stream, vision: Tensor | None) -> tuple[Tensor, Stream]:
        """Compute the part of a layer after attention; return the next layer's input, or after the last one the normed
        rows, and what goes along."""
        layers = self.weights.layers
        norm = layers[nth + 1].attention_norm if nth + 1 < len(layers) else self.weights.norm
        x, residual = self._after_attention(layers[nth], attended.flatten(1), stream.residual, vision, norm)
        return x, Stream(stream.cos, stream.sin, residual)

    @torch.no_grad()
    def project(self, x: Tensor) -> Tensor:
        """Return the logits, [n, vocabulary] float32, of some rows of `hidden`."""
        return self._ops.logits(x, self.weights.head)

    def _after_attention(
        self, layer: Layer, attended: Tensor, residual: Tensor, vision: Tensor | None, norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the part of a layer after attention, and the norm before the next layer's."""
        ops, eps, mlp = self._ops, self.config.norm_eps, layer.mlp
        if isinstance(mlp, SwiGLU):
            x, residual = ops.linear_add_norm(attended, layer.out, residual, layer.mlp_norm, eps)
            return ops.mlp_add_norm(x, mlp, residual, norm, eps)
        top_k = self.config.experts_per_token
        return ops.linear_moe_add_norm(attended, layer.out, residual, layer.mlp_norm, mlp, vision, top_k, norm, eps)


def rotary_plan(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the frequencies theta^(-2i / head_dim) and the axis each one follows: the lowest `time_freqs` follow t
    (0), the others h (1) and w (2) by turns.

    Returns:
        [head_dim / 2] float32 and [head_dim / 2] int64.
    """
    dim = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    axes = torch.arange(dim // 2) % 2 + 1
    axes[dim // 2 - config.time_freqs :] = 0
    return frequencies.to(device), axes.to(device)
