"""The resampler: the tower's output to rows of the language model's width, one per 2 x 2 patches of two frames."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from services.mm_encoder.weights import Merger, Resampler
from shared.model_config import VisionConfig


def run_resampler(
    x: Tensor, grids: Sequence[tuple[int, int, int]], weights: Resampler, config: VisionConfig, rms_eps: float
) -> Tensor:
    """[N, hidden] in merge-block order to [rows, text hidden]; a single frame is paired with itself."""
    block = config.spatial_merge_size**2
    x = _merge(x.reshape(-1, block * x.shape[1]), weights.spatial, config.norm_eps)
    sizes = [t * h * w // block for t, h, w in grids]
    pairs = [
        _pair(one, t, config.temporal_merge_size) for one, (t, _, _) in zip(torch.split(x, sizes), grids, strict=True)
    ]
    x = _merge(torch.cat(pairs), weights.temporal, config.norm_eps)
    return _rms_norm(F.linear(x, weights.out.weight, weights.out.bias), weights.norm, rms_eps)


def _pair(x: Tensor, frames: int, temporal: int) -> Tensor:
    """[frames * n, d] to [frames / temporal * n, temporal * d]: the vectors at one place of consecutive frames."""
    if frames == 1:
        return x.repeat(1, temporal)
    return x.reshape(frames // temporal, temporal, -1, x.shape[1]).transpose(1, 2).flatten(2).flatten(0, 1)


def _merge(x: Tensor, merger: Merger, eps: float) -> Tensor:
    x = F.gelu(F.linear(x, merger.first.weight, merger.first.bias))
    x = F.linear(x, merger.second.weight, merger.second.bias)
    return F.layer_norm(x, merger.norm.weight.shape, merger.norm.weight, merger.norm.bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
