"""Vision tower: patches to one vector each. Attention is within a frame.

For a whole pass, only the rows themselves and one layer's queries, keys and values are in memory; all else is computed
for some rows at a time (rows.py), so that the largest image leaves room on a shared card. Attention writes over the
queries, and as all of it is done by then, what follows may write the next layer's over these in turn.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from services.mm_encoder.vision.ops import Ops
from services.mm_encoder.vision.pace import PassPace
from services.mm_encoder.vision.rows import spans
from services.mm_encoder.vision.tables import Tables
from services.mm_encoder.vision.weights import Block, Linear, Tower
from shared.model.config import VisionConfig


def run_tower(
    x: Tensor, tables: Tables, weights: Tower, config: VisionConfig, ops: Ops, at_once: int, pace: PassPace
) -> Tensor:
    """Map [N, hidden] embedded patches, in merge-block order, to [N, hidden], in place, `at_once` rows at a time."""
    width, eps, blocks = config.hidden_size, config.norm_eps, weights.blocks
    qkv = x.new_empty(len(x), 3 * width)
    for rows in spans(len(x), at_once):
        _project(ops.add_norm(x[rows], None, blocks[0].norm1, eps), blocks[0].qkv, qkv[rows])
    for number, block in enumerate(blocks, 1):
        following = blocks[number] if number < len(blocks) else None
        ops.rotate(qkv, config.num_heads, tables)
        for tiles, operations in pace.attention:
            attended = ops.attend(qkv, config.num_heads, tables.some(tiles))
            pace.pace.spend(operations)
        norm = weights.norm if following is None else following.norm1
        for rows in spans(len(x), at_once):
            normed = ops.add_norm(x[rows], _mlp(x[rows], attended[rows], block, eps, ops), norm, eps)
            if following is None:
                x[rows] = normed
            else:
                _project(normed, following.qkv, qkv[rows])
            del normed
            pace.spend(rows)
    return x


def _mlp(x: Tensor, attended: Tensor, block: Block, eps: float, ops: Ops) -> Tensor:
    """Add attention's part to x in place; return the MLP's part."""
    normed = ops.add_norm(x, F.linear(attended, block.proj.weight, block.proj.bias), block.norm2, eps)
    inner = F.linear(normed, block.fc1.weight, block.fc1.bias)
    ops.quick_gelu(inner)
    return F.linear(inner, block.fc2.weight, block.fc2.bias)


def _project(x: Tensor, linear: Linear, out: Tensor) -> None:
    torch.addmm(linear.bias, x, linear.weight.T, out=out)
