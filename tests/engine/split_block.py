"""Blocks of a decoder, small, and the parts of them that a rank has."""

from collections.abc import Callable

import torch
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, INPUTS, COUNT, SIZES, SHARED = 48, 32, 4, (32, 16), 64
Pair = tuple[Tensor, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 0.3).to(DEVICE)


def swiglu(size: int, seed: int, *experts: int) -> tuple[Tensor, Tensor]:
    return draw(*experts, 2 * size, HIDDEN, seed=seed), draw(*experts, HIDDEN, size, seed=seed + 1)


def half(rank: int, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """A rank's part of a block's weights."""
    gate, up = gate_up.chunk(2, -2)
    rows = torch.cat([gate.chunk(2, -2)[rank], up.chunk(2, -2)[rank]], -2)
    return rows, down.chunk(2, -1)[rank].contiguous()


TEXT, VISION, ALL = swiglu(SIZES[0], 1, COUNT), swiglu(SIZES[1], 3, COUNT), swiglu(SHARED, 5)
OUT, NORMS = draw(HIDDEN, INPUTS, seed=7), [1 + draw(HIDDEN, seed=8), 1 + draw(HIDDEN, seed=9)]
GATE, BIAS = draw(2 * COUNT, HIDDEN, seed=10), draw(2 * COUNT, seed=11)


def moe(part: Callable[..., tuple[Tensor, Tensor]]) -> MoE:
    return MoE(GATE, BIAS, ExpertPool(*part(*TEXT)), ExpertPool(*part(*VISION)), SwiGLU(*part(*ALL)))


def block(ops: Ops, x: Tensor, out: Tensor, residual: Tensor, experts: MoE, vision: Tensor | None) -> Pair:
    return ops.linear_moe_add_norm(x, out, residual, NORMS[0], experts, vision, 2, NORMS[1], 1e-5)
