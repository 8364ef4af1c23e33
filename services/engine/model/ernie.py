"""The decoder: one step over the new tokens of many sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.kernels.experts import ExpertPool
from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Weight
from services.engine.model.inputs import KVCache, StepInput
from shared.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """down(silu(gate x) * up x)."""

    gate_up: Weight  # [2 I, hidden]: gate rows, then up rows
    down: Weight  # [hidden, I]


@dataclass(frozen=True, slots=True)
class MoE:
    """Two pools of routed experts, and a shared one that every token visits."""

    gate: Tensor  # [2 E, hidden] float32: text, then vision
    bias: Tensor  # [2 E] float32
    text: ExpertPool
    vision: ExpertPool
    shared: SwiGLU


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: Tensor  # [hidden]
    qkv: Weight  # [(heads + 2 kv_heads) head_dim, hidden]: queries, keys, values
    out: Weight  # [hidden, heads head_dim]
    mlp_norm: Tensor  # [hidden]
    mlp: SwiGLU | MoE


@dataclass(frozen=True, slots=True)
class Weights:
    """All of the decoder, on one device, in one dtype but for the routers and what is quantised."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocabulary, hidden]; the same tensor as `embedding` when tied


class ErnieModel:
    """Computes logits and fills the cache. Holds nothing of any request."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self._ops = ops
        self._frequencies, self._axes = rotary_plan(config, weights.norm.device)
        self._scale = config.head_dim**-0.5

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, of the cache and of the embeddings in a StepInput."""
        return self.weights.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.norm.device

    @torch.no_grad()
    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Run one step: the cache gains its rows' keys and values.

        Returns:
            [R, vocabulary] float32, one row for each of step.logit_rows.
        """
        ops, weights, eps = self._ops, self.weights, self.config.norm_eps
        cos, sin = ops.rotary_tables(step.positions, self._frequencies, self._axes)
        residual = ops.embed(weights.embedding, step.token_ids, step.embed_rows, step.embeds)
        x = ops.rms_norm(residual, weights.layers[0].attention_norm, eps)
        for i, layer in enumerate(weights.layers):
            if i > 0:
                x, residual = ops.add_rms_norm(x, residual, layer.attention_norm, eps)
            x = self._attention(layer, x, cos, sin, step, cache.keys[i], cache.values[i])
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = self._mlp(layer.mlp, x, step.vision)
        rows = step.logit_rows
        x, _ = ops.add_rms_norm(x[rows], residual[rows], weights.norm, eps)
        return ops.logits(x, weights.head)

    def _attention(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, step: StepInput, keys: Tensor, values: Tensor
    ) -> Tensor:
        ops, heads, kv_heads = self._ops, self.config.num_heads, self.config.num_kv_heads
        qkv = ops.linear(x, layer.qkv).view(len(x), heads + 2 * kv_heads, self.config.head_dim)
        ops.rotary(qkv[:, : heads + kv_heads], cos, sin)
        ops.kv_write(qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :], keys, values, step.slots)
        attended = ops.paged_attention(
            qkv[:, :heads],
            keys,
            values,
            step.block_tables,
            step.query_start,
            step.context_lens,
            step.max_query_len,
            step.max_context_len,
            self._scale,
        )
        return ops.linear(attended.flatten(1), layer.out)

    def _mlp(self, mlp: SwiGLU | MoE, x: Tensor, vision: Tensor) -> Tensor:
        if isinstance(mlp, SwiGLU):
            return self._swiglu(mlp, x)
        ids, weights = self._ops.router(x, mlp.gate, mlp.bias, vision, self.config.experts_per_token)
        routed = self._ops.experts(x, ids, weights, mlp.text, mlp.vision)
        return routed + self._swiglu(mlp.shared, x)

    def _swiglu(self, mlp: SwiGLU, x: Tensor) -> Tensor:
        return self._ops.linear(self._ops.silu_mul(self._ops.linear(x, mlp.gate_up)), mlp.down)


def rotary_plan(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frequencies theta^(-2i / head_dim) and the axis each one follows: the lowest `time_freqs` follow t (0), the
    others h (1) and w (2) by turns.

    Returns:
        [head_dim / 2] float32 and [head_dim / 2] int64.
    """
    dim = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    axes = torch.arange(dim // 2) % 2 + 1
    axes[dim // 2 - config.time_freqs :] = 0
    return frequencies.to(device), axes.to(device)
