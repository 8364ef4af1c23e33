"""Memory of the decoder in each format, by the shapes that its loader asks for: no tensor is read."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from services.engine.kernels.quantize import Bits, Quantized, Weight, quantize, with_plain
from services.engine.kernels.reference.moe import MoE
from services.engine.model.ernie import Layer, Weights
from services.engine.model.split import WHOLE, Split
from services.engine.model.weights import dtype_of, load_weights, widths
from services.engine.run.memory import block_bytes
from shared.model.checkpoint import Checkpoint
from shared.model.config import ModelConfig
from shared.model.config_file import Quantization


def decoder_shapes(checkpoint: Checkpoint, config: ModelConfig, split: Split = WHOLE) -> Weights:
    """Load the decoder as stored, or a rank's part of it, without values.

    Args:
        checkpoint: opened with headers_only.

    Raises:
        CheckpointError: as `load_weights`, whose names and shapes these are.
    """
    return load_weights(checkpoint, config, dtype_of(config), torch.device("meta"), None, split)


def weight_bytes(stored: Weights, quantization: Quantization | None, *, both: bool = False) -> int:
    """Count what `stored` takes once it is loaded; what is stored quantised stays so.

    Args:
        both: dense projections are kept in both forms, as on a device with much memory.
    """
    dense_bits, expert_bits = widths(quantization)
    total = sum(tensor.nbytes for tensor in _kept(stored))
    for layer in stored.layers:
        total += sum(_bytes(weight, dense_bits, both) for weight in _dense(layer))
        total += sum(_bytes(weight, expert_bits, False) for weight in _routed(layer))
    return total


def cache_bytes(config: ModelConfig) -> int:
    """Count the keys and values of one token; given a rank's part of a model (`divided`), those that it keeps."""
    return block_bytes(config, 1, dtype_of(config))


def _kept(stored: Weights) -> Iterator[Tensor]:
    """Yield what is never quantised."""
    yield from (stored.embedding, stored.norm)
    if stored.head is not stored.embedding:
        yield stored.head
    for layer in stored.layers:
        yield from (layer.attention_norm, layer.mlp_norm)
        if isinstance(layer.mlp, MoE):
            yield from (layer.mlp.gate, layer.mlp.bias)


def _dense(layer: Layer) -> tuple[Weight, ...]:
    mlp = layer.mlp.shared if isinstance(layer.mlp, MoE) else layer.mlp
    return layer.qkv, layer.out, mlp.gate_up, mlp.down


def _routed(layer: Layer) -> tuple[Weight, ...]:
    if not isinstance(layer.mlp, MoE):
        return ()
    return tuple(weight for pool in (layer.mlp.text, layer.mlp.vision) for weight in (pool.gate_up, pool.down))


def _bytes(weight: Weight, bits: Bits | None, both: bool) -> int:
    if isinstance(weight, Quantized):
        plain = weight.scale.numel() * weight.in_features * weight.scale.element_size() if both else 0
        return weight.nbytes + plain
    return _format_bytes(tuple(weight.shape), weight.dtype, bits, both)


@cache
def _format_bytes(shape: tuple[int, ...], dtype: torch.dtype, bits: Bits | None, both: bool) -> int:
    """Ask the formats themselves. A model has few shapes and many tensors, hence the cache."""
    weight = torch.empty(shape, dtype=dtype, device="meta")
    if bits is None:
        return weight.nbytes
    packed = quantize(weight, bits)
    return (with_plain(packed) if both else packed).nbytes
