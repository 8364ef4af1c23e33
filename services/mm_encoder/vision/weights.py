"""Weights of the vision tower and the resampler, by the hub's names, as frozen values.

`identity` is a hash of all that was loaded, part of the key of embeddings: other weights never share them.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.model.config import ModelConfig
from shared.model.tensor_source import TensorSource

PREFIXES = ("vision_model.", "model.resampler_model.")


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights of y = x @ weight.T + bias; also LayerNorm's scale and shift."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Weights of one transformer layer of the tower."""

    norm1: Linear
    qkv: Linear
    proj: Linear
    norm2: Linear
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True, slots=True)
class Tower:
    """Weights of the tower; `patch_embed`, without bias, is [hidden, channels * patch * patch]."""

    patch_embed: Tensor
    blocks: tuple[Block, ...]
    norm: Linear


@dataclass(frozen=True, slots=True)
class Merger:
    """Weights of a Linear, GELU, Linear, LayerNorm."""

    first: Linear
    second: Linear
    norm: Linear


@dataclass(frozen=True, slots=True)
class Resampler:
    """Weights that join 2 x 2 patches, then two frames, then project to the language model's width."""

    spatial: Merger
    temporal: Merger
    out: Linear
    norm: Tensor


@dataclass(frozen=True, slots=True)
class VisionWeights:
    """All weights, on one device in one dtype."""

    tower: Tower
    resampler: Resampler
    identity: bytes


class _Reader:
    """Reader of tensors that converts, hashes and moves them to the device."""

    def __init__(self, source: TensorSource, dtype: torch.dtype, device: str) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device
        self.digest = hashlib.sha256(str(dtype).encode())

    def tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._source.get(name, shape).to(self._dtype).contiguous()
        self.digest.update(f"{name} {list(shape)}".encode())
        if not tensor.is_meta:  # headers only
            self.digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return tensor.to(self._device)

    def linear(self, name: str, *shape: int) -> Linear:
        return Linear(self.tensor(f"{name}.weight", *shape), self.tensor(f"{name}.bias", shape[0]))

    def merger(self, name: str, width: int, out: int) -> Merger:
        first = self.linear(f"{name}.0", out, width)
        return Merger(first, self.linear(f"{name}.2", out, out), self.linear(f"{name}.3", out))


def load_weights(source: TensorSource, config: ModelConfig, device: str) -> VisionWeights:
    """Read all vision weights in the model's dtype.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not used by the model.
    """
    reader = _Reader(source, getattr(torch, config.dtype), device)
    tower = _tower(reader, config)
    resampler = _resampler(reader, config)
    source.check_all_used(PREFIXES)
    return VisionWeights(tower, resampler, reader.digest.digest())


def _tower(reader: _Reader, config: ModelConfig) -> Tower:
    vision = config.vision
    width = vision.hidden_size
    patch = vision.in_channels * vision.patch_size**2
    embed = reader.tensor("vision_model.patch_embed.proj.weight", width, patch)
    blocks = tuple(
        _block(reader, f"vision_model.blocks.{i}", width, vision.intermediate_size) for i in range(vision.depth)
    )
    return Tower(embed, blocks, reader.linear("vision_model.ln", width))


def _block(reader: _Reader, name: str, width: int, inner: int) -> Block:
    return Block(
        norm1=reader.linear(f"{name}.norm1", width),
        qkv=reader.linear(f"{name}.attn.qkv", 3 * width, width),
        proj=reader.linear(f"{name}.attn.proj", width, width),
        norm2=reader.linear(f"{name}.norm2", width),
        fc1=reader.linear(f"{name}.mlp.fc1", inner, width),
        fc2=reader.linear(f"{name}.mlp.fc2", width, inner),
    )


def _resampler(reader: _Reader, config: ModelConfig) -> Resampler:
    name = "model.resampler_model"
    joined = config.vision.hidden_size * config.vision.spatial_merge_size**2
    return Resampler(
        spatial=reader.merger(f"{name}.spatial_linear", joined, joined),
        temporal=reader.merger(f"{name}.temporal_linear", joined * config.vision.temporal_merge_size, joined),
        out=reader.linear(f"{name}.mlp", config.hidden_size, joined),
        norm=reader.tensor(f"{name}.after_norm.weight", config.hidden_size),
    )
