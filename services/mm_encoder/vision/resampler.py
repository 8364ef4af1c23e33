"""Resampler: the tower's output to rows of the language model's width, one per 2 x 2 patches of two frames."""

import torch
import torch.nn.functional as F
from torch import Tensor

from services.mm_encoder.vision.rows import by_rows
from services.mm_encoder.vision.tables import Tables
from services.mm_encoder.vision.weights import Merger, Resampler
from shared.model.config import VisionConfig


def run_resampler(
    x: Tensor, tables: Tables, weights: Resampler, config: VisionConfig, rms_eps: float, at_once: int
) -> Tensor:
    """Map [N, hidden] in merge-block order to [rows, text hidden], `at_once` rows at a time."""
    eps, block = config.norm_eps, config.spatial_merge_size**2
    x = by_rows(lambda rows: _merge(rows, weights.spatial, eps), x.reshape(-1, block * x.shape[1]), at_once)

    def finish(places: Tensor) -> Tensor:
        joined = _merge(x[places].flatten(1), weights.temporal, eps)
        return _rms_norm(F.linear(joined, weights.out.weight, weights.out.bias), weights.norm, rms_eps)

    return by_rows(finish, tables.pairs, at_once)


def _merge(x: Tensor, merger: Merger, eps: float) -> Tensor:
    x = F.gelu(F.linear(x, merger.first.weight, merger.first.bias))
    x = F.linear(x, merger.second.weight, merger.second.bias)
    return F.layer_norm(x, merger.norm.weight.shape, merger.norm.weight, merger.norm.bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
