"""The decoder: one step over the new tokens of many sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.model.inputs import KVCache, StepInput
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
    """The decoder's forward pass: computes logits and fills the cache. Keeps no state of any request."""

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
        ops, weights, eps = self._ops, self.weights, self.config.norm_eps
        cos, sin = ops.rotary_tables(step.positions, self._frequencies, self._axes)
        residual = ops.embed(weights.embedding, step.token_ids, step.embed_rows, step.embeds)
        x = ops.rms_norm(residual, weights.layers[0].attention_norm, eps)
        norms = [*(layer.attention_norm for layer in weights.layers[1:]), weights.norm]
        for layer, keys, values, norm in zip(weights.layers, cache.keys, cache.values, norms, strict=True):
            query = ops.qkv(x, layer.qkv, cos, sin, keys, values, step.slots)
            attended = self._attention(query, step, keys, values)
            x, residual = self._after_attention(layer, attended, residual, step.vision, norm)
        return x

    @torch.no_grad()
    def project(self, x: Tensor) -> Tensor:
        """Return the logits, [n, vocabulary] float32, of some rows of `hidden`."""
        return self._ops.logits(x, self.weights.head)

    def _attention(self, query: Tensor, step: StepInput, keys: Tensor, values: Tensor) -> Tensor:
        attended = self._ops.paged_attention(
            query,
            keys,
            values,
            step.block_tables,
            step.query_start,
            step.context_lens,
            step.max_query_len,
            step.max_context_len,
            self._scale,
            step.lengths,
        )
        return attended.flatten(1)

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
