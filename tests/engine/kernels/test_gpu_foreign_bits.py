"""Four and eight bits that others have quantised, with their scales and zero points, by every product of Triton's.

Without a GPU this runs in Triton's interpreter.
"""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from services.engine.kernels.quantize import FOREIGN_GROUPS, Bits, Quantized, dequantize
from services.engine.kernels.quantize import foreign as packed
from services.engine.kernels.reference.experts import ExpertPool, experts
from services.engine.kernels.triton.dense import dequantize as gpu_dequantize
from services.engine.kernels.triton.dense import linear as gpu_linear
from services.engine.kernels.triton.moe import experts as gpu_experts
from services.engine.kernels.triton.moe import grouped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cannot multiply matrices of bfloat16, and cuts off instead of rounding to it.
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
ALL_FORMS = [(bits, group) for bits in (4, 8) for group in FOREIGN_GROUPS]
FORMS = pytest.mark.parametrize(("bits", "group"), ALL_FORMS)
# Of products that the interpreter takes seconds for: both numbers of bits, and every group.
SOME_FORMS = pytest.mark.parametrize(
    ("bits", "group"), ALL_FORMS if DEVICE == "cuda" else list(zip((4, 8, 4), FOREIGN_GROUPS, strict=True))
)


def foreign(*shape: int, bits: Bits, group: int, dtype: torch.dtype, seed: int = 0) -> tuple[Quantized, Tensor]:
    """A weight, and what its values, scales and zero points stand for, in float64."""
    generator = torch.Generator().manual_seed(seed + sum(shape) + group)
    groups = -(-shape[-1] // group)
    q = torch.randint(0, 1 << bits, shape, generator=generator)
    zero = torch.randint(0, 1 << bits, (*shape[:-1], groups), generator=generator)
    scale = (torch.rand(*shape[:-1], groups, generator=generator) * 0.8 + 0.02) / (1 << bits)
    scale = scale.to(dtype)
    exact = (q - zero.repeat_interleave(group, -1)[..., : shape[-1]]).double()
    exact *= scale.double().repeat_interleave(group, -1)[..., : shape[-1]]
    values = (q - (1 << (bits - 1))).to(torch.int8).to(DEVICE)
    weight = packed(values, scale.to(DEVICE), zero.to(DEVICE), group, bits)
    return weight, exact.to(DEVICE)


def close(actual: Tensor, expected: Tensor) -> None:
    limit = 1e-5 if actual.dtype == torch.float32 else 1e-2
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < limit, f"relative error {error:.2e}"


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 512), (2, 3, 1056), (3, 40)])
def test_dequantised_are_the_checkpoint_s_numbers_rounded_once(
    shape: tuple[int, ...], group: int, bits: Bits, dtype: torch.dtype
) -> None:
    weight, exact = foreign(*shape, bits=bits, group=group, dtype=dtype)
    assert torch.equal(dequantize(weight), exact.to(dtype))
    if dtype == torch.float32 or (DEVICE == "cuda" and dtype == torch.bfloat16):  # no model is served in float16
        assert torch.equal(gpu_dequantize.dequantize(weight), exact.to(dtype))
    if len(shape) == 3:
        assert torch.equal(dequantize(weight[1]), exact[1].to(dtype))


@FORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "shape"), [(1, (40, 512)), (17, (100, 672)), (70, (64, 1024))])
def test_linear(rows: int, shape: tuple[int, int], group: int, bits: Bits, dtype: torch.dtype) -> None:
    weight, exact = foreign(*shape, bits=bits, group=group, dtype=dtype)
    x = torch.randn(rows, shape[1]).to(dtype).to(DEVICE)
    close(gpu_linear.linear(x, weight), x.double() @ exact.T)


def drawn_experts(rows: int, count: int, group: int, bits: Bits) -> tuple[Tensor, Tensor, ExpertPool, ExpertPool]:
    """Return rows, the two experts of each, and pools of `count` experts for text and for vision."""
    dtype, hidden = DTYPES[0], 192
    text, vision = (
        ExpertPool(
            foreign(count, 2 * width, hidden, bits=bits, group=group, dtype=dtype, seed=width)[0],
            foreign(count, hidden, width, bits=bits, group=group, dtype=dtype, seed=width + 1)[0],
        )
        for width in (160, 96)
    )
    x = torch.randn(rows, hidden).to(dtype).to(DEVICE)
    ids = torch.stack([torch.randperm(2 * count)[:2] for _ in range(rows)]).to(torch.int32).to(DEVICE)
    return x, ids, text, vision


def check_experts(x: Tensor, ids: Tensor, text: ExpertPool, vision: ExpertPool) -> None:
    """Compare the weighted results of the experts with the reference's."""
    weights = torch.rand(len(x), 2).to(DEVICE)
    results = gpu_experts.expert_results(x, ids, text, vision)
    actual = (results.view(len(x), 2, -1) * weights.unsqueeze(-1)).sum(1)
    close(actual, experts(x, ids, weights, text, vision))


@SOME_FORMS
@pytest.mark.parametrize("rows", [1, 24])
def test_experts_by_pairs_and_by_sorted_tiles(rows: int, group: int, bits: Bits) -> None:
    check_experts(*drawn_experts(rows, 4, group, bits))


@SOME_FORMS
def test_experts_as_a_grouped_product(group: int, bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "ROWS_PER_EXPERT", 1)
    monkeypatch.setattr(grouped, "INT8_ROWS_PER_EXPERT", 1)
    x, ids, text, vision = drawn_experts(40, 2, group, bits)
    assert grouped.uses_grouped_gemm(x, 2, text, vision)
    check_experts(x, ids, text, vision)
