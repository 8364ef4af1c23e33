"""Batch-invariant operations give a row the same bits alone and in any company, on the GPU.

At the real model's widths: narrower ones take other tiles. Without a GPU the torch definitions, at small widths and
within a rounding: so that what only a card judges is run by everyone. (Their own promise on CPUs is judged in
test_reproducible.py, and in the interpreter products are numpy's, whose rows depend on each other.)
"""

from typing import Literal

import pytest
import torch
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Bits, Weight, quantize
from services.engine.kernels.reference import linear as reference_linear
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.reference.paged_attention import PagedSequences

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if ON_GPU:
    from services.engine.kernels.triton.invariant.linear import linear
    from services.engine.kernels.triton.invariant.ops import invariant_ops

    OPS = invariant_ops()
else:
    OPS = Ops()

    def linear(x: Tensor, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
        """Return one part, as the GPU's does."""
        return reference_linear.linear(x, weight)[None]


HIDDEN, TEXT, VISION, SHARED, VOCABULARY = (2560, 1536, 512, 3072, 103424) if ON_GPU else (128, 64, 32, 96, 500)
HEADS, KV_HEADS, DIM, EXPERTS = (20, 4, 128, 64) if ON_GPU else (10, 2, 32, 8)
ROWS = 1100 if ON_GPU else 120
PARTS = [slice(0, 1), slice(5, 7), slice(100, 117), slice(3, 36), slice(20, 84), slice(0, 300), slice(40, 1100)]
BITS = pytest.mark.parametrize("bits", [16, 8, 4])


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).bfloat16()


def assert_same(part: Tensor, whole: Tensor) -> None:
    if ON_GPU:
        assert torch.equal(part, whole)
    else:
        torch.testing.assert_close(part, whole)


def weight(*shape: int, bits: Bits | Literal[16], seed: int = 1) -> Weight:
    plain = draw(*shape, seed=seed, scale=0.02)
    return plain if bits == 16 else quantize(plain, bits)


@BITS
@pytest.mark.parametrize("outputs", [HIDDEN, (HEADS + 2 * KV_HEADS) * DIM])
def test_products(bits: Bits | Literal[16], outputs: int) -> None:
    x, w = draw(ROWS, HIDDEN), weight(outputs, HIDDEN, bits=bits)
    whole = linear(x, w)[0]
    for part in PARTS:
        assert_same(linear(x[part], w)[0], whole[part])


def test_logits() -> None:
    x, head = draw(300, HIDDEN), draw(VOCABULARY, HIDDEN, seed=1, scale=0.02)
    whole = OPS.logits(x, head)
    for part in PARTS[:-1]:
        assert_same(OPS.logits(x[part], head), whole[part])


@BITS
def test_a_block_of_experts(bits: Bits | Literal[16]) -> None:
    text, vision = (
        ExpertPool(
            weight(EXPERTS, 2 * width, HIDDEN, bits=bits, seed=width),
            weight(EXPERTS, HIDDEN, width, bits=bits, seed=width + 1),
        )
        for width in (TEXT, VISION)
    )
    shared = SwiGLU(weight(2 * SHARED, HIDDEN, bits=bits), weight(HIDDEN, SHARED, bits=bits))
    gate, bias = draw(2 * EXPERTS, HIDDEN, seed=5, scale=0.02).float(), draw(2 * EXPERTS, seed=6, scale=0.01).float()
    moe, out = MoE(gate, bias, text, vision, shared), weight(HIDDEN, HIDDEN, bits=bits, seed=7)
    x, residual, norm = draw(ROWS, HIDDEN), draw(ROWS, HIDDEN, seed=8), draw(HIDDEN, seed=9)
    for media in (torch.arange(ROWS, device=DEVICE) % 3 == 1, None):

        def block(part: slice, media: Tensor | None = media) -> tuple[Tensor, Tensor]:
            images = None if media is None else media[part]
            return OPS.linear_moe_add_norm(x[part], out, residual[part], norm, moe, images, 6, norm, 1e-5)

        whole = block(slice(None))
        for part in PARTS:
            for own, expected in zip(block(part), whole, strict=True):
                assert_same(own, expected[part])


@pytest.mark.parametrize("page", [64, 16])
def test_attention_however_a_prompt_is_cut(page: int) -> None:
    length, companions = 700, (1, 90, 333)
    pages = -(-length // page)
    total = pages * (1 + len(companions))
    keys, values = (draw(total, page, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    tables = torch.randperm(total, device=DEVICE).int().view(1 + len(companions), pages)
    query, others = draw(length, HEADS, DIM, seed=3), draw(400, HEADS, DIM, seed=4)

    def attend(first: int, last: int, beside: tuple[int, ...], new: int) -> Tensor:
        """Queries first..last - 1 of the sequence, after one chunk of `new` of each companion's tokens."""
        counts = [*(min(new, context) for context in beside), last - first]
        rows = torch.cat([*(others[:count] for count in counts[:-1]), query[first:last]])
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
        contexts = torch.tensor([*beside, last], dtype=torch.int32, device=DEVICE)
        table = torch.cat([tables[1 : 1 + len(beside)], tables[:1]])
        most, longest = max(counts), max((last, *beside))
        paged = PagedSequences(table, starts, contexts, most, longest)
        out = OPS.paged_attention(rows, keys, values, paged, DIM**-0.5, None, None)
        return out[-(last - first) :]

    whole = attend(0, length, (), 0)
    for first, last in [(0, 1), (63, 64), (64, 65), (699, 700), (100, 117), (1, 700), (130, 600)]:
        for beside, new in [((), 0), ((1,), 1), (companions, 1), (companions, 200)]:
            assert_same(attend(first, last, beside, new), whole[first:last])
