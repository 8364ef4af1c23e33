"""Batch-invariant operations give a row the same bits alone and in any company, on the GPU.

At the real model's widths: narrower ones take other tiles. The interpreter's products are numpy's, whose rows depend
on each other, so that test_gpu_ops.py can only look there at whether they are right.
"""

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from services.engine.kernels.quantize import Weight, quantize
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.triton.invariant.linear import linear
from services.engine.kernels.triton.invariant.ops import invariant_ops

OPS = invariant_ops()
HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS = 2560, 20, 4, 128, 64
ROWS = 1100
PARTS = [slice(0, 1), slice(5, 7), slice(100, 117), slice(3, 36), slice(20, 84), slice(0, 300), slice(40, 1100)]
BITS = pytest.mark.parametrize("bits", [16, 8, 4])


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).bfloat16()


def weight(*shape: int, bits: int, seed: int = 1) -> Weight:
    plain = draw(*shape, seed=seed, scale=0.02)
    return plain if bits == 16 else quantize(plain, bits)  # type: ignore[arg-type]


@BITS
@pytest.mark.parametrize("outputs", [HIDDEN, 3584])
def test_products(bits: int, outputs: int) -> None:
    x, w = draw(ROWS, HIDDEN), weight(outputs, HIDDEN, bits=bits)
    whole = linear(x, w)[0]
    for part in PARTS:
        assert torch.equal(linear(x[part], w)[0], whole[part])


def test_logits() -> None:
    x, head = draw(300, HIDDEN), draw(103424, HIDDEN, seed=1, scale=0.02)
    whole = OPS.logits(x, head)
    for part in PARTS[:-1]:
        assert torch.equal(OPS.logits(x[part], head), whole[part])


@BITS
def test_a_block_of_experts(bits: int) -> None:
    pools = [
        ExpertPool(
            weight(EXPERTS, 2 * width, HIDDEN, bits=bits, seed=width),
            weight(EXPERTS, HIDDEN, width, bits=bits, seed=width + 1),
        )
        for width in (1536, 512)
    ]
    shared = SwiGLU(weight(2 * 3072, HIDDEN, bits=bits), weight(HIDDEN, 3072, bits=bits))
    gate, bias = draw(2 * EXPERTS, HIDDEN, seed=5, scale=0.02).float(), draw(2 * EXPERTS, seed=6, scale=0.01).float()
    moe, out = MoE(gate, bias, *pools, shared), weight(HIDDEN, HIDDEN, bits=bits, seed=7)
    x, residual, norm = draw(ROWS, HIDDEN), draw(ROWS, HIDDEN, seed=8), draw(HIDDEN, seed=9)
    for media in (torch.arange(ROWS, device="cuda") % 3 == 1, None):

        def block(part: slice, media: Tensor | None = media) -> tuple[Tensor, Tensor]:
            vision = None if media is None else media[part]
            return OPS.linear_moe_add_norm(x[part], out, residual[part], norm, moe, vision, 6, norm, 1e-5)

        whole = block(slice(None))
        for part in PARTS:
            for own, expected in zip(block(part), whole, strict=True):
                assert torch.equal(own, expected[part])


@pytest.mark.parametrize("page", [64, 16])
def test_attention_however_a_prompt_is_cut(page: int) -> None:
    length, companions = 700, (1, 90, 333)
    pages = -(-length // page)
    total = pages * (1 + len(companions))
    keys, values = (draw(total, page, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    tables = torch.randperm(total, device="cuda").int().view(1 + len(companions), pages)
    query, others = draw(length, HEADS, DIM, seed=3), draw(400, HEADS, DIM, seed=4)

    def attend(first: int, last: int, beside: tuple[int, ...], new: int) -> Tensor:
        """Queries first..last - 1 of the sequence, after one chunk of `new` of each companion's tokens."""
        counts = [*(min(new, context) for context in beside), last - first]
        rows = torch.cat([*(others[:count] for count in counts[:-1]), query[first:last]])
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        contexts = torch.tensor([*beside, last], dtype=torch.int32, device="cuda")
        table = torch.cat([tables[1 : 1 + len(beside)], tables[:1]])
        out = OPS.paged_attention(
            rows, keys, values, table, starts, contexts, max(counts), max(last, *beside), DIM**-0.5, ()
        )
        return out[-(last - first) :]

    whole = attend(0, length, (), 0)
    for first, last in [(0, 1), (63, 64), (64, 65), (699, 700), (100, 117), (1, 700), (130, 600)]:
        for beside, new in [((), 0), ((1,), 1), (companions, 1), (companions, 200)]:
            assert torch.equal(attend(first, last, beside, new), whole[first:last]), (first, last, beside, new)
