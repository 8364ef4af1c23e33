"""The vision tower: patches to one vector a patch. Attention never leaves a frame.

Frames are independent of each other here, so a pass may hold any mix of frames; those of one size that follow each
other are one batch of attention.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from services.mm_encoder.weights import Block, Linear, Tower
from shared.model_config import VisionConfig

Frames = Sequence[tuple[int, int, int]]  # grids: (frames, patch rows, patch columns), in row order


def run_tower(x: Tensor, grids: Frames, weights: Tower, config: VisionConfig) -> Tensor:
    """[N, channels * patch * patch] patches to [N, hidden]: N is the sum of t * h * w, in merge-block order."""
    x = F.linear(x, weights.patch_embed)
    cos, sin = rotary(grids, config, x.device)
    lengths = [h * w for t, h, w in grids for _ in range(t)]
    batches = [(sum(1 for _ in run), length) for length, run in groupby(lengths)]
    for block in weights.blocks:
        x = x + _attention(_norm(x, block.norm1, config.norm_eps), batches, cos, sin, block, config.num_heads)
        x = x + _mlp(_norm(x, block.norm2, config.norm_eps), block)
    return _norm(x, weights.norm, config.norm_eps)


def rotary(grids: Frames, config: VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [N, 1, head_dim] fp32: a quarter of the dimensions by row, a quarter by column, repeated."""
    quarter = config.hidden_size // config.num_heads // 4
    frequencies = config.rope_theta ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    places = torch.cat([_places(h, w, config.spatial_merge_size, device).repeat(t, 1) for t, h, w in grids])
    angles = (places[:, :, None] * frequencies).flatten(1).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def _places(h: int, w: int, merge: int, device: torch.device) -> Tensor:
    """[h * w, 2] float: (row, column) of each patch of a frame, in merge-block order."""
    rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    blocks = torch.stack([rows, columns], dim=-1).reshape(h // merge, merge, w // merge, merge, 2)
    return blocks.permute(0, 2, 1, 3, 4).reshape(h * w, 2).float()


def _attention(
    x: Tensor, batches: Sequence[tuple[int, int]], cos: Tensor, sin: Tensor, block: Block, heads: int
) -> Tensor:
    q, k, v = F.linear(x, block.qkv.weight, block.qkv.bias).reshape(x.shape[0], 3, heads, -1).unbind(1)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    done: list[Tensor] = []
    start = 0
    for count, length in batches:
        stop = start + count * length
        # [count, heads, length, head_dim]
        one, two, three = (part[start:stop].view(count, length, heads, -1).transpose(1, 2) for part in (q, k, v))
        done.append(F.scaled_dot_product_attention(one, two, three).transpose(1, 2).reshape(stop - start, -1))
        start = stop
    return F.linear(torch.cat(done), block.proj.weight, block.proj.bias)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of [N, heads, head_dim], in fp32."""
    left, right = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


def _mlp(x: Tensor, block: Block) -> Tensor:
    inner = F.linear(x, block.fc1.weight, block.fc1.bias)
    return F.linear(inner * torch.sigmoid(1.702 * inner), block.fc2.weight, block.fc2.bias)


def _norm(x: Tensor, norm: Linear, eps: float) -> Tensor:
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, eps)
