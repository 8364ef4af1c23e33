"""Reads the decoder from a checkpoint, layer by layer, into the layouts the operations want."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from services.engine.kernels.memory_budget import has_spare_memory
from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Bits, Quantized, Weight, bits_of, quantize, with_plain
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.model.ernie import ErnieModel, Layer, Weights
from services.engine.model.integers import Integers, integers_of, joined
from services.engine.model.split import WHOLE, Split
from shared.errors import CheckpointError
from shared.model.config import ModelConfig
from shared.model.config_file import Quantization
from shared.model.division import divided
from shared.model.tensor_source import TensorSource

Quantize = Callable[[Tensor, Bits], Quantized]

DECODER_PREFIXES = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    source: TensorSource,
    config: ModelConfig,
    device: str,
    quantization: Quantization | None,
    ops: Ops,
    split: Split = WHOLE,
) -> ErnieModel:
    """The decoder of a checkpoint, or a rank's part of it, in the dtype of its configuration, ready to run on `device`.

    Raises:
        ConfigError: the ranks cannot share the model equally.
        CheckpointError: a tensor is missing, has another shape than the configuration says, or is not expected; or
            the quantisation does not fit the model.
    """
    own = divided(config, split.size)
    stored = dtype_of(config)
    weights = load_weights(source, config, stored, torch.device(device), quantization, split, ops.quantize)
    return ErnieModel(own, weights, ops)


def dtype_of(config: ModelConfig) -> torch.dtype:
    """
    Raises:
        CheckpointError: the model has a dtype that is not computed in.
    """
    if config.dtype not in _DTYPES:
        raise CheckpointError(f"torch_dtype {config.dtype!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[config.dtype]


def load_weights(
    checkpoint: TensorSource,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None,
    split: Split = WHOLE,
    quantize: Quantize = quantize,
) -> Weights:
    """Every decoder tensor, each read once. At most one layer exists in both its stored and its final form.

    Of a model that is split, a rank reads its parts and quantises these, so a row that ranks sum has a scale in each.

    wint8 keeps every projection in 8 bits; wint4 the routed experts in 4 and the other projections in 8. Embedding,
    head, norms and routers are never quantised. On a device with much memory, dense projections are kept in both forms:
    few rows wait for the bytes of a weight, many for its dequantising.

    Raises:
        CheckpointError: as `load_model`.
    """
    kept = has_spare_memory(device)
    read = _Reader(checkpoint, config, dtype, device, *widths(quantization), quantize, kept, split)
    embedding = read.plain("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(read.layer(i) for i in range(config.num_layers))
    norm = read.plain("model.norm.weight", config.hidden_size)
    weights = Weights(embedding, layers, norm, read.head(embedding))
    checkpoint.check_all_used(DECODER_PREFIXES)
    return weights


def widths(quantization: Quantization | None) -> tuple[Bits | None, Bits | None]:
    """Bits of the dense projections and of the routed experts."""
    if quantization is None:
        return None, None
    return 8, 8 if quantization == "wint8" else 4


@dataclass(frozen=True, slots=True)
class _Reader:
    checkpoint: TensorSource
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    dense_bits: Bits | None
    expert_bits: Bits | None
    quantize: Quantize
    both: bool
    split: Split

    def plain(self, name: str, *shape: int) -> Tensor:
        return self.checkpoint.get(name, shape).to(self.device, self.dtype)

    def part(self, name: str, *shape: int, dim: int) -> Tensor:
        """Read this rank's part of a tensor of that shape."""
        whole = self.checkpoint.get(name, shape)
        return self.split.part(whole, dim).to(self.device, self.dtype).contiguous()

    def projection(self, name: str, *shape: int, dim: int) -> Tensor | Integers:
        """Read this rank's part of a weight [out, in], in floating point or as the integers that are stored."""
        outputs, inputs = shape
        stored = self.checkpoint.integers(name, (outputs, inputs), self.device)
        if stored is None:
            return self.part(name, *shape, dim=dim)
        own = self.config.stored in get_args(Quantization)
        return integers_of(stored, self.dtype, name, own).part(self.split, dim, name)

    def rows(self, names: Sequence[str], sizes: Sequence[int], inputs: int) -> Tensor | Integers:
        """Read weights that are multiplied as one, and join their outputs."""
        read = [self.projection(name, size, inputs, dim=0) for name, size in zip(names, sizes, strict=True)]
        stored = [weight for weight in read if isinstance(weight, Integers)]
        if len(stored) == len(read):
            return joined(stored, names)
        if stored:
            raise CheckpointError(f"of {', '.join(names)}, which are multiplied as one, only some are stored quantised")
        return torch.cat([weight for weight in read if isinstance(weight, Tensor)])

    def precise(self, name: str, *shape: int) -> Tensor:
        return self.checkpoint.get(name, shape).to(self.device, torch.float32)

    def head(self, embedding: Tensor) -> Tensor:
        """A head that is stored and differs from the embedding counts, even where the configuration says tied."""
        name = "lm_head.weight"
        if self.config.tie_embeddings and not self.checkpoint.has(name):
            return embedding
        head = self.plain(name, *embedding.shape)
        # Without values (headers only) nothing can be compared, and more memory is the safer answer.
        return head if head.is_meta or not torch.equal(head, embedding) else embedding

    def layer(self, index: int) -> Layer:
        config, prefix = self.config, f"model.layers.{index}."
        hidden, attention = config.hidden_size, f"{prefix}self_attn."
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = self.rows([f"{attention}{x}_proj.weight" for x in "qkv"], (q_size, kv_size, kv_size), hidden)
        return Layer(
            attention_norm=self.plain(f"{prefix}input_layernorm.weight", hidden),
            qkv=self._dense(qkv),
            out=self._dense(self.projection(f"{attention}o_proj.weight", hidden, q_size, dim=1)),
            mlp_norm=self.plain(f"{prefix}post_attention_layernorm.weight", hidden),
            mlp=self._mlp(index, f"{prefix}mlp."),
        )

    def _mlp(self, index: int, prefix: str) -> SwiGLU | MoE:
        config = self.config
        if index in config.dense_layers:
            return self._dense_swiglu(prefix, config.intermediate_size)
        count, hidden = config.num_experts, config.hidden_size
        # Stored as [hidden, experts], unlike every other projection.
        gates = [self.precise(f"{prefix}gate.{name}", hidden, count).T for name in ("weight", "weight_1")]
        bias = self.precise(f"{prefix}moe_statics.e_score_correction_bias", 2, count).flatten()
        pools = [self._pool(prefix, 0, config.text_expert_size), self._pool(prefix, count, config.vision_expert_size)]
        if len({_format(weight) for pool in pools for weight in (pool.gate_up, pool.down)}) > 1:
            raise CheckpointError(f"the experts of {prefix}experts are not all quantised alike")
        return MoE(
            gate=torch.cat(gates),
            bias=bias,
            text=pools[0],
            vision=pools[1],
            shared=self._dense_swiglu(f"{prefix}shared_experts.", config.shared_expert_size),
        )

    def _pool(self, prefix: str, first: int, size: int) -> ExpertPool:
        count = self.config.num_experts
        return _stack((self._expert(f"{prefix}experts.{first + e}.", size) for e in range(count)), count, prefix)

    def _expert(self, prefix: str, size: int) -> SwiGLU:
        gate_up, down = self._projections(prefix, size)
        return SwiGLU(self._pack(gate_up, self.expert_bits), self._pack(down, self.expert_bits))

    def _dense_swiglu(self, prefix: str, size: int) -> SwiGLU:
        gate_up, down = self._projections(prefix, size)
        return SwiGLU(self._dense(gate_up), self._dense(down))

    def _projections(self, prefix: str, size: int) -> tuple[Tensor | Integers, Tensor | Integers]:
        hidden = self.config.hidden_size
        gate_up = self.rows([f"{prefix}{name}_proj.weight" for name in ("gate", "up")], (size, size), hidden)
        return gate_up, self.projection(f"{prefix}down_proj.weight", hidden, size, dim=1)

    def _dense(self, weight: Tensor | Integers) -> Weight:
        packed = self._pack(weight, self.dense_bits)
        return with_plain(packed) if self.both and isinstance(packed, Quantized) else packed

    def _pack(self, weight: Tensor | Integers, bits: Bits | None) -> Weight:
        if isinstance(weight, Integers):
            return weight.packed()
        return weight if bits is None else self.quantize(weight, bits)


def _stack(experts: Iterator[SwiGLU], count: int, prefix: str) -> ExpertPool:
    """One expert at a time into its place, so that no second copy of the pool ever exists."""
    first = next(experts)
    pool = ExpertPool(_room(first.gate_up, count), _room(first.down, count))
    _put(pool, 0, first)
    for e, expert in enumerate(experts, 1):
        if (_format(expert.gate_up), _format(expert.down)) != (_format(first.gate_up), _format(first.down)):
            raise CheckpointError(f"the experts of {prefix}experts are not all quantised alike")
        _put(pool, e, expert)
    return pool


def _format(weight: Weight) -> tuple[int, int]:
    """Return what the kernels are told of a weight's format: bits of a value, and others' groups in a plane."""
    return (weight.bits, weight.subgroups) if isinstance(weight, Quantized) else (bits_of(weight), 0)


def _room(like: Weight, count: int) -> Weight:
    if not isinstance(like, Quantized):
        return like.new_empty(count, *like.shape)
    data, scale, *groups = (part.new_empty(count, *part.shape) for part in _tensors(like))
    return replace(like, data=data, scale=scale, groups=groups[0] if groups else None)


def _put(pool: ExpertPool, index: int, expert: SwiGLU) -> None:
    parts = _tensors(expert.gate_up) + _tensors(expert.down)
    for room, part in zip(_tensors(pool.gate_up) + _tensors(pool.down), parts, strict=True):
        room[index] = part


def _tensors(weight: Weight) -> tuple[Tensor, ...]:
    parts = (weight.data, weight.scale, weight.groups) if isinstance(weight, Quantized) else (weight,)
    return tuple(part for part in parts if part is not None)
