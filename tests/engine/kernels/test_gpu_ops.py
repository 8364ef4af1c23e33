"""Triton operations against their torch references: on the GPU where there is one, else in Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from services.engine.kernels.experts import ExpertPool
from services.engine.kernels.gpu import experts as gpu_experts
from services.engine.kernels.gpu.ops import gpu_ops
from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Weight, quantize

OPS, REFERENCE = gpu_ops(), Ops()
DTYPES = [torch.float32, torch.bfloat16]
# The interpreter keeps bfloat16 as its bits and cannot multiply matrices of it.
DOT_DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values from a seed, on the device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def close(actual: Tensor, expected: Tensor) -> None:
    """Relative error of the whole within what one rounding to the dtype allows."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.isfinite(actual).all()
    limit = 1e-5 if actual.dtype == torch.float32 else 1e-2
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < limit, f"relative error {error:.2e}"


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element nobody wrote is seen."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(1 << 30))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 100), (5, 2560)])
def test_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (
        draw(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, width), (rows, width), (width,)])
    )
    close(OPS.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    for actual, expected in zip(
        OPS.add_rms_norm(x, residual, weight, 1e-5), REFERENCE.add_rms_norm(x, residual, weight, 1e-5), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_of_strided_rows(dtype: torch.dtype) -> None:
    qkv = draw(5, 7, 24, dtype=dtype)
    expected = qkv.clone()
    cos, sin = draw(5, 12, seed=1), draw(5, 12, seed=2)
    OPS.rotary(qkv[:, :5], cos, sin)
    REFERENCE.rotary(expected[:, :5], cos, sin)
    close(qkv, expected)
    assert torch.equal(qkv[:, 5:], expected[:, 5:])


def test_kv_write() -> None:
    qkv = draw(4, 6, 24)
    key, value = qkv[:, 2:4], qkv[:, 4:]
    slots = torch.tensor([7, 0, 13, 4], device=DEVICE)
    keys, values = draw(3, 5, 2, 24, seed=3), draw(3, 5, 2, 24, seed=4)
    expected = keys.clone(), values.clone()
    OPS.kv_write(key, value, keys, values, slots)
    REFERENCE.kv_write(key, value, *expected, slots)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    x = draw(3, 2 * 1100, dtype=dtype)
    close(OPS.silu_mul(x), REFERENCE.silu_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [8, 6, 64])
def test_router(experts: int, dtype: torch.dtype) -> None:
    x, gate, bias = draw(9, 40, dtype=dtype), draw(2 * experts, 40, seed=1), draw(2 * experts, seed=2, scale=0.1)
    vision = torch.arange(9, device=DEVICE) % 3 == 0
    ids, weights = OPS.router(x, gate, bias, vision, 5)
    expected_ids, expected_weights = REFERENCE.router(x, gate, bias, vision, 5)
    assert torch.equal(ids, expected_ids)
    close(weights, expected_weights)


def weight(*shape: int, bits: int, dtype: torch.dtype, seed: int) -> Weight:
    plain = draw(*shape, dtype=dtype, seed=seed, scale=0.2)
    return plain if bits == 16 else quantize(plain, bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 96, 40), (19, 130, 17), (70, 64, 100), (300, 320, 130)])
def test_linear(rows: int, inputs: int, outputs: int, bits: int, dtype: torch.dtype) -> None:
    x, w = draw(rows, inputs + 8, dtype=dtype)[:, :inputs], weight(outputs, inputs, bits=bits, dtype=dtype, seed=1)
    close(OPS.linear(x, w), REFERENCE.linear(x, w))


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [1, 5, 33, 700])
def test_experts_of_two_widths(rows: int, bits: int, dtype: torch.dtype) -> None:
    experts, hidden, top_k = 4, 48, 3

    def pool(width: int, seed: int) -> ExpertPool:
        return ExpertPool(
            weight(experts, 2 * width, hidden, bits=bits, dtype=dtype, seed=seed),
            weight(experts, hidden, width, bits=bits, dtype=dtype, seed=seed + 1),
        )

    text, vision = pool(40, 1), pool(24, 3)
    generator = torch.Generator().manual_seed(rows)
    choice = torch.rand(rows, experts, generator=generator).topk(top_k, -1).indices
    ids = (choice + experts * (torch.arange(rows) % 3 == 0).long().unsqueeze(1)).to(torch.int32).to(DEVICE)
    weights = torch.rand(rows, top_k, generator=generator).to(DEVICE)
    x = draw(rows, hidden, dtype=dtype)
    close(OPS.experts(x, ids, weights, text, vision), REFERENCE.experts(x, ids, weights, text, vision))


@pytest.mark.parametrize("pairs", [1, 37, 3000])
@pytest.mark.parametrize("tile", [16, 128])
def test_rows_are_grouped_by_expert(pairs: int, tile: int) -> None:
    experts = 16
    ids = torch.randint(0, experts, (pairs,), generator=torch.Generator().manual_seed(pairs)).to(torch.int32)
    place, tile_expert = (t.cpu() for t in gpu_experts.group_rows(ids.to(DEVICE), experts, tile))
    assert sorted(place[place >= 0].tolist()) == list(range(pairs))
    for row, pair in enumerate(place.tolist()):
        if pair >= 0:
            assert tile_expert[row // tile] == ids[pair]
    assert all(e >= experts for e, t in zip(tile_expert, place.view(-1, tile), strict=True) if (t < 0).all())


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("lengths", [[1, 1, 1], [1], [5, 1, 40], [130, 3], [16, 17]])
def test_attention_over_shuffled_pages(lengths: list[int], dtype: torch.dtype) -> None:
    page, heads, kv_heads, dim = 16, 10, 2, 24
    contexts = [n + cached for n, cached in zip(lengths, (0, 100, 33), strict=False)]
    needed = [-(-c // page) for c in contexts]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for row, blocks in zip(tables, order.split(needed), strict=True):
        row[: len(blocks)] = blocks
    keys, values = (draw(sum(needed), page, kv_heads, dim, dtype=dtype, seed=s) for s in (5, 6))
    qkv = draw(sum(lengths), heads + 2, dim, dtype=dtype)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    arguments = (
        qkv[:, :heads],
        keys,
        values,
        tables.to(DEVICE),
        starts.to(DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        max(lengths),
        max(contexts),
        dim**-0.5,
    )
    close(OPS.paged_attention(*arguments), REFERENCE.paged_attention(*arguments))


def test_rotary_takes_the_tables_it_is_given() -> None:
    positions = torch.randint(0, 1000, (3, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    axes = torch.tensor([1, 2, 1, 2, 0, 0], device=DEVICE)
    cos, sin = REFERENCE.rotary_tables(positions, draw(6).abs(), axes)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    x = draw(5, 2, 12)
    expected = x.clone()
    OPS.rotary(x, cos, sin)
    REFERENCE.rotary(expected, cos, sin)
    close(x, expected)
