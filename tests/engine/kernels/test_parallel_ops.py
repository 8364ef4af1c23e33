"""Operations of one rank: two of them, as threads that compute by turns, give what the whole operation gives."""

from collections.abc import Callable

import pytest
import torch
from rank_threads import on_ranks
from split_block import ALL, DEVICE, HIDDEN, INPUTS, NORMS, OUT, Pair, block, draw, half, moe
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.parallel import Gather, parallel_ops
from services.engine.kernels.triton import parallel
from services.engine.kernels.triton.invariant.ops import invariant_ops
from services.engine.kernels.triton.ops import gpu_ops

KINDS: dict[str, Callable[[Gather], Ops]] = {
    "reference": parallel_ops,
    "fast": lambda gather: parallel.parallel_ops(gpu_ops(), gather),
    "invariant": lambda gather: parallel.parallel_ops(invariant_ops(), gather, parallel.INVARIANT),
}


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
