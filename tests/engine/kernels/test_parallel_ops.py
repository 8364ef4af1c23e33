"""Operations of one rank: two of them, as threads that compute by turns, give what the whole operation gives."""

from collections.abc import Callable

import pytest
import torch
from rank_threads import on_ranks
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.reference.parallel import Gather, parallel_ops
from services.engine.kernels.triton import parallel
from services.engine.kernels.triton.invariant.ops import invariant_ops
from services.engine.kernels.triton.ops import gpu_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, INPUTS, COUNT, SIZES, SHARED = 48, 32, 4, (32, 16), 64
KINDS: dict[str, Callable[[Gather], Ops]] = {
    "reference": parallel_ops,
    "fast": lambda gather: parallel.parallel_ops(gpu_ops(), gather),
    "invariant": lambda gather: parallel.parallel_ops(invariant_ops(), gather, parallel.INVARIANT),
}
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


def check(kind: str, whole: Pair, work: Callable[[int, Ops], Pair], exchanges: int) -> None:
    found, counted = on_ranks(2, lambda rank, gather: work(rank, KINDS[kind](gather)))
    assert counted == exchanges
    for mine, theirs, expected in zip(*found, whole, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 24])  # scored with the norm, and by a product of their own
def test_two_ranks_compute_a_block_of_experts(kind: str, rows: int) -> None:
    x, residual = draw(rows, INPUTS, seed=12), draw(rows, HIDDEN, seed=13)
    vision = None if rows == 1 else torch.arange(rows, device=DEVICE) % 3 == 1

    def work(rank: int, ops: Ops) -> Pair:
        own = x.chunk(2, -1)[rank]  # the heads of this rank
        experts = moe(lambda *weights: half(rank, *weights))
        return block(ops, own, OUT.chunk(2, -1)[rank].contiguous(), residual, experts, vision)

    check(kind, block(Ops(), x, OUT, residual, moe(lambda *weights: weights), vision), work, exchanges=2)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_compute_a_dense_layer(kind: str) -> None:
    x, residual = draw(3, INPUTS, seed=14), draw(3, HIDDEN, seed=15)

    def layer(ops: Ops, own: Tensor, out: Tensor, mlp: SwiGLU) -> Pair:
        normed, total = ops.linear_add_norm(own, out, residual, NORMS[0], 1e-5)
        return ops.mlp_add_norm(normed, mlp, total, NORMS[1], 1e-5)

    def work(rank: int, ops: Ops) -> Pair:
        out = OUT.chunk(2, -1)[rank].contiguous()
        return layer(ops, x.chunk(2, -1)[rank].contiguous(), out, SwiGLU(*half(rank, *ALL)))

    check(kind, layer(Ops(), x, OUT, SwiGLU(*ALL)), work, exchanges=2)
