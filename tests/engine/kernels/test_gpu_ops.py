"""Triton operations against their torch references: on the GPU where there is one, else in Triton's interpreter."""

import dataclasses
import os
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Quantized, Weight, dequantize, quantize, with_plain
from services.engine.kernels.reference.experts import ExpertPool, experts
from services.engine.kernels.reference.linear import linear
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.reference.paged_attention import AttentionLaunch, PagedSequences
from services.engine.kernels.reference.rotary import rotary_tables
from services.engine.kernels.reference.router import router
from services.engine.kernels.triton.attention import paged_attention as gpu_attention
from services.engine.kernels.triton.attention import qkv as gpu_qkv
from services.engine.kernels.triton.attention import whole_prompt
from services.engine.kernels.triton.dense import dequantize as gpu_dequantize
from services.engine.kernels.triton.dense import linear as gpu_linear
from services.engine.kernels.triton.dense.rms_norm import add_norm
from services.engine.kernels.triton.invariant.ops import invariant_ops
from services.engine.kernels.triton.moe import experts as gpu_experts
from services.engine.kernels.triton.moe import grouped, grouped_plain, grouped_quantized
from services.engine.kernels.triton.moe import router as gpu_router
from services.engine.kernels.triton.moe.add_norm_scores import add_norm_scores
from services.engine.kernels.triton.moe.sort import group_pairs, sort_pairs
from services.engine.kernels.triton.ops import gpu_ops

OPS, INVARIANT, REFERENCE = gpu_ops(), invariant_ops(), Ops()
BOTH = pytest.mark.parametrize("ops", [OPS, INVARIANT], ids=["fast", "invariant"])
DTYPES = [torch.float32, torch.bfloat16]
# The interpreter keeps bfloat16 as its bits and cannot multiply matrices of it.
DOT_DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
# Where many shapes are tried; the interpreter takes the same way for all dtypes, and its time.
MAIN_DTYPES = DOT_DTYPES if DEVICE == "cuda" else DOT_DTYPES[:1]


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
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, norm = draw(rows, width, dtype=dtype), draw(width, dtype=dtype, seed=1)
    close(OPS.rms_norm(x, norm, 1e-5), REFERENCE.rms_norm(x, norm, 1e-5))


@pytest.mark.parametrize(("rows", "half"), [(1, 64), (40, 12)])
def test_rotary_tables(rows: int, half: int) -> None:
    positions = torch.randint(0, 131072, (4, rows), generator=torch.Generator().manual_seed(0)).to(DEVICE)[1:]
    frequencies = (1.0 / 500000.0 ** (torch.arange(half) / half)).to(DEVICE)
    axes = (torch.arange(half, device=DEVICE) % 3).flip(0)
    for actual, expected in zip(
        OPS.rotary_tables(positions, frequencies, axes), rotary_tables(positions, frequencies, axes), strict=True
    ):
        # Both of what a float32 product of position and frequency is.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
def test_logits(rows: int, dtype: torch.dtype, ops: Ops) -> None:
    x, head = draw(rows, 96, dtype=dtype), draw(301, 96, dtype=dtype, seed=1)
    exact = x.double() @ head.double().T
    actual = ops.logits(x, head)
    assert actual.dtype == torch.float32
    assert (actual - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 5e-3)


def weight(*shape: int, bits: int, dtype: torch.dtype, seed: int) -> Weight:
    plain = draw(*shape, dtype=dtype, seed=seed, scale=0.2)
    return plain if bits == 16 else quantize(plain, bits)  # type: ignore[arg-type]


def draw_pool(count: int, hidden: int, width: int, bits: int, dtype: torch.dtype, seed: int = 0) -> ExpertPool:
    return ExpertPool(
        weight(count, 2 * width, hidden, bits=bits, dtype=dtype, seed=width + seed),
        weight(count, hidden, width, bits=bits, dtype=dtype, seed=width + seed + 1),
    )


@BOTH
@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_qkv(rows: int, bits: int, dtype: torch.dtype, ops: Ops) -> None:
    heads, kv_heads, dim, hidden = 5, 2, 24, 1100
    x, w = draw(rows, hidden, dtype=dtype), weight((heads + 2 * kv_heads) * dim, hidden, bits=bits, dtype=dtype, seed=1)
    positions = torch.randint(0, 1000, (3, rows), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    axes = torch.tensor([1, 2] * 4 + [0] * 4, device=DEVICE)
    cos, sin = ops.rotary_tables(positions, draw(dim // 2).abs(), axes)
    slots = torch.randperm(75, generator=torch.Generator().manual_seed(0))[:rows].to(DEVICE)
    caches = [draw(15, 5, kv_heads, dim, dtype=dtype, seed=s) for s in (3, 4)]
    expected = [cache.clone() for cache in caches]
    query = ops.qkv(x, w, cos, sin, caches[0], caches[1], slots, None)
    close(query, REFERENCE.qkv(x, w, cos, sin, expected[0], expected[1], slots, None))
    untouched = [slot for slot in range(75) if slot not in slots.tolist()]
    for actual, reference in zip(caches, expected, strict=True):
        close(actual, reference)
        assert torch.equal(actual.flatten(0, 1)[untouched], reference.flatten(0, 1)[untouched])
    # The counts are 0 again.
    assert torch.equal(ops.qkv(x, w, cos, sin, caches[0], caches[1], slots, None), query)


def test_qkv_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_qkv, "MANY_ROWS", 3)
    test_qkv(5, 16, torch.float32, OPS)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("rows", [3, 5])
def test_a_weight_in_both_forms(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_linear, "PLAIN_ROWS", 4)
    monkeypatch.setattr(gpu_linear, "UNSPLIT_ROWS", 0)
    x, w = draw(rows, 300, dtype=dtype), quantize(draw(50, 300, dtype=dtype, seed=1), 8)
    wrong = dataclasses.replace(w, plain=torch.zeros(50, 300, dtype=dtype, device=DEVICE))
    assert (gpu_linear.linear(x, wrong) == 0).all() == (rows >= 4), "the one that is asked for is used"
    close(gpu_linear.linear(x, with_plain(w)), linear(x, w))


@BOTH
@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [1, 70])
def test_a_dense_block(rows: int, bits: int, dtype: torch.dtype, ops: Ops) -> None:
    # In parts along the inputs either way; that each of them takes several blocks, test_qkv and test_linear see to.
    hidden, width = 70, 1100 if DEVICE == "cuda" else 600
    mlp = SwiGLU(
        weight(2 * width, hidden, bits=bits, dtype=dtype, seed=1), weight(hidden, width, bits=bits, dtype=dtype, seed=2)
    )
    x, residual, norm = (draw(*s, dtype=dtype, seed=3 + len(s)) for s in [(rows, hidden), (rows, hidden), (hidden,)])
    for actual, expected in zip(
        ops.mlp_add_norm(x, mlp, residual, norm, 1e-5),
        REFERENCE.mlp_add_norm(x, mlp, residual, norm, 1e-5),
        strict=True,
    ):
        close(actual, expected)


@BOTH
@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize(("rows", "bits"), [(1, 8), (3, 16), (7, 8), (20, 8)])
def test_a_block_of_experts(rows: int, bits: int, dtype: torch.dtype, ops: Ops) -> None:
    count, hidden, width = 4, 300, 50
    pools = [draw_pool(count, hidden, w, 4, dtype) for w in (40, 24)]
    shared = SwiGLU(
        weight(2 * width, hidden, bits=bits, dtype=dtype, seed=8),
        weight(hidden, width, bits=bits, dtype=dtype, seed=9),
    )
    moe = MoE(draw(2 * count, hidden, seed=5), draw(2 * count, seed=6), pools[0], pools[1], shared)
    x, residual = draw(rows, 70, dtype=dtype, seed=3), draw(rows, hidden, dtype=dtype, seed=4)
    out = weight(hidden, 70, bits=bits, dtype=dtype, seed=10)
    norms = [draw(hidden, dtype=dtype, seed=s) for s in (11, 12)]
    for vision in (torch.arange(rows, device=DEVICE) % 3 == 1, None):
        arguments = (x, out, residual, norms[0], moe, vision, 3, norms[1], 1e-5)
        for actual, expected in zip(
            ops.linear_moe_add_norm(*arguments), REFERENCE.linear_moe_add_norm(*arguments), strict=True
        ):
            close(actual, expected)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("rows", "hidden", "experts"), [(1, 2560, 64), (9, 40, 8), (70, 300, 6)])
def test_router(rows: int, hidden: int, experts: int, dtype: torch.dtype) -> None:
    x, gate, bias = draw(rows, hidden, dtype=dtype), draw(2 * experts, hidden, seed=1), draw(2 * experts, seed=2)
    gate, vision = gate / hidden**0.5, torch.arange(rows, device=DEVICE) % 3 == 0
    ids, weights = gpu_router.router(x, gate, bias, vision, 5)
    expected_ids, expected_weights = router(x, gate, bias, vision, 5)
    assert torch.equal(ids, expected_ids)
    close(weights, expected_weights)
    # The counts are 0 again.
    again = gpu_router.router(x, gate, bias, vision, 5)
    assert torch.equal(again[0], ids)
    assert torch.equal(again[1], weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "parts", "hidden", "experts"), [(1, 1, 2560, 64), (3, 4, 100, 5)])
def test_norm_and_scores(rows: int, parts: int, hidden: int, experts: int, dtype: torch.dtype) -> None:
    partial, residual = draw(parts, rows, hidden), draw(rows, hidden, dtype=dtype)
    norm, gate = draw(hidden, dtype=dtype, seed=1), draw(2 * experts, hidden, seed=2)
    x, total, scores = add_norm_scores(partial, residual, norm, 1e-5, gate)
    expected, expected_total = add_norm(partial, residual, norm, 1e-5)
    close(total, expected_total)
    close(x, expected)
    close(scores, x.float() @ gate.T)


@pytest.mark.parametrize("rows", [1, 3])
def test_router_of_scores(rows: int) -> None:
    x, gate, bias = draw(rows, 40), draw(16, 40, seed=1), draw(16, seed=2)
    vision = torch.arange(rows, device=DEVICE) % 2 == 1
    ids, weights = gpu_router.router(x, gate, bias, vision, 5, x @ gate.T)
    expected_ids, expected_weights = router(x, gate, bias, vision, 5)
    assert torch.equal(ids, expected_ids)
    close(weights, expected_weights)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_equals_and_no_numbers_rank_by_their_place() -> None:
    scores = torch.zeros(3, 16, device=DEVICE)
    scores[1] = float("nan")
    scores[2, 3] = 1.0
    nothing = torch.zeros(16, device=DEVICE)
    vision = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    ids, _ = gpu_router.router(draw(3, 40), draw(16, 40), nothing, vision, 3, scores)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2], [3, 0, 1]]


def test_a_rows_experts_do_not_depend_on_the_others() -> None:
    """Within a rounding in the interpreter: numpy's products depend on their shapes."""
    hidden, within = (2560, 0.0) if DEVICE == "cuda" else (256, 1e-5)
    x, gate, bias = draw(70, hidden, dtype=DOT_DTYPES[1]), draw(128, hidden, seed=1, scale=0.02), draw(128, seed=2)
    vision = torch.arange(70, device=DEVICE) % 3 == 0
    ids, weights = gpu_router.router(x, gate, bias, vision, 6)
    for part in (slice(0, 17), slice(20, 37), slice(30, 70)):  # all by the matrix units
        own_ids, own_weights = gpu_router.router(x[part], gate, bias, vision[part], 6)
        assert torch.equal(own_ids, ids[part])
        torch.testing.assert_close(own_weights, weights[part], rtol=within, atol=0)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_of_no_numbers_gets_experts() -> None:
    x, gate = torch.full((2, 40), float("nan"), device=DEVICE), draw(16, 40)
    ids, _ = gpu_router.router(x, gate, draw(16), torch.tensor([False, True], device=DEVICE), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4], [8, 9, 10, 11, 12]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_router_of_many_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_router, "TILED_ROWS", 30)
    test_router(31, 96, 6, dtype)


def test_three_summands_hold_a_gate() -> None:
    gate = draw(6, 500) * 2.0 ** torch.arange(-3, 3, device=DEVICE).unsqueeze(1)
    parts = gpu_router.split(gate).view(3, 6, 500).double()
    assert ((parts.sum(0) - gate.double()).abs() <= gate.double().abs() * 2.0**-24).all()


@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 96, 40), (19, 1300, 17), (70, 64, 100), (300, 320, 130), (1030, 130, 17)]
)
def test_linear(rows: int, inputs: int, outputs: int, bits: int, dtype: torch.dtype) -> None:
    x, w = draw(rows, inputs + 8, dtype=dtype)[:, :inputs], weight(outputs, inputs, bits=bits, dtype=dtype, seed=1)
    close(gpu_linear.linear(x, w), linear(x, w))


def test_few_rows_split_the_inputs() -> None:
    w = weight(64, 2560, bits=8, dtype=torch.float32, seed=1)
    assert [len(gpu_linear.partial_linear(draw(rows, 2560), w)) for rows in (1, 17)] == [1, 2]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_dequantize(bits: int, dtype: torch.dtype) -> None:
    w = weight(3, 19, 300, bits=bits, dtype=dtype, seed=1)
    assert isinstance(w, Quantized)
    assert torch.equal(gpu_dequantize.dequantize(w), dequantize(w))


def test_every_stored_byte_widens_exactly() -> None:
    values = torch.arange(-128, 128, device=DEVICE).to(torch.int8).view(16, 16)
    w = Quantized(values, torch.ones(16, dtype=torch.bfloat16, device=DEVICE), 8, 16)
    assert torch.equal(gpu_dequantize.dequantize(w), values.bfloat16())


@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [1, 5, 33, 700] if DEVICE == "cuda" else [1, 5, 33])
def test_experts_of_two_widths(rows: int, bits: int, dtype: torch.dtype) -> None:
    count, hidden, top_k = 4, 300, 3

    text, vision = (draw_pool(count, hidden, width, bits, dtype) for width in (40, 24))
    generator = torch.Generator().manual_seed(rows)
    choice = torch.rand(rows, count, generator=generator).topk(top_k, -1).indices
    ids = (choice + count * (torch.arange(rows) % 3 == 0).long().unsqueeze(1)).to(torch.int32).to(DEVICE)
    weights = torch.rand(rows, top_k, generator=generator).to(DEVICE)
    x = draw(rows, hidden, dtype=dtype)
    results = gpu_experts.expert_results(x, ids, text, vision).float().view(rows, top_k, hidden)
    combined = (results * weights.unsqueeze(-1)).sum(1).to(dtype)
    close(combined, experts(x, ids, weights, text, vision))


def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are many. Tiles are small, and do not divide the widths, which the copy engine can read."""
    monkeypatch.setattr(grouped_plain, "ROWS", 16)
    monkeypatch.setattr(grouped, "ROWS_PER_EXPERT", 1)
    monkeypatch.setattr(grouped, "INT8_ROWS_PER_EXPERT", 1)
    monkeypatch.setattr(grouped, "has_memory_for_copies", lambda device: True)
    for name, outputs in (("GATE_UP", 16), ("DOWN", 32)):
        monkeypatch.setattr(grouped_plain, name, grouped_plain.ProductShape(outputs, 32, 4, 2))
    monkeypatch.setattr(grouped_quantized, "SMALL_TILE", 16)
    monkeypatch.setattr(grouped_quantized, "LARGE_TILE", 32)
    monkeypatch.setattr(grouped_quantized, "WEIGHT_ROWS", 64)


@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize(
    ("bits", "many", "media"), [(16, 256, 1), (8, 256, 1), (4, 256, 1), (4, 1, 1), (16, 256, 0), (4, 256, 0)]
)
def test_experts_of_many_rows(
    bits: int, many: int, media: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some experts get no row.
    rows, count, hidden, top_k = 90, 4, 72, 3
    group(monkeypatch)
    monkeypatch.setattr(grouped_quantized, "LARGE_TILE_ROWS_PER_EXPERT", many)

    text, vision = (draw_pool(count, hidden, width, bits, dtype) for width in (40, 24))
    generator = torch.Generator().manual_seed(rows)
    choice = torch.rand(rows, count, generator=generator).topk(top_k, -1).indices
    choice[choice == 2] = 1
    choice += count * (torch.arange(rows) % 3 < media).long().unsqueeze(1)
    ids = choice.to(torch.int32).to(DEVICE)
    weights = torch.rand(rows, top_k, generator=generator).to(DEVICE)
    x = draw(rows, hidden, dtype=dtype)
    assert grouped.uses_grouped_gemm(x, top_k, text, vision)
    results = gpu_experts.expert_results(x, ids, text, vision, media > 0).float().view(rows, top_k, hidden)
    combined = (results * weights.unsqueeze(-1)).sum(1).to(dtype)
    close(combined, experts(x, ids, weights, text, vision))


def test_the_copy_engine_reads_rows_of_whole_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "ROWS_PER_EXPERT", 1)
    for hidden, aligned in ((72, True), (71, False)):
        pool = ExpertPool(draw(4, 80, hidden), draw(4, hidden, 40))
        assert grouped.uses_grouped_gemm(draw(90, hidden), 3, pool, pool) == aligned


@pytest.mark.parametrize(("pairs", "experts"), [(1, 4), (37, 16), (3000, 16)])
@pytest.mark.parametrize("tile", [16, 128])
def test_pairs_are_sorted_by_expert(pairs: int, experts: int, tile: int) -> None:
    ids = torch.randint(0, experts, (pairs,), generator=torch.Generator().manual_seed(pairs)).to(torch.int32)
    ids[ids == 1] = 0
    order = sort_pairs(ids.to(DEVICE), experts, tile)
    fields = (order.sorted_pair_ids, order.expert_ids, order.tile_bounds, order.rows, order.ends)
    pair_ids, expert_ids, bounds, rows, ends = (field.tolist() for field in fields)
    assert sorted(pair for pair in pair_ids if pair >= 0) == list(range(pairs))
    for row, pair in enumerate(pair_ids):
        if pair >= 0:
            assert expert_ids[row // tile] == ids[pair]
    tiles = [-(-count // tile) for count in torch.bincount(ids, minlength=experts).tolist()]
    assert bounds == [0, sum(tiles[: experts // 2]), sum(tiles)]
    assert all(expert == experts for expert in expert_ids[bounds[2] :])
    assert [pair_ids[row] for row in rows] == list(range(pairs))
    counts = torch.bincount(ids, minlength=experts)
    assert ends == [tile * sum(tiles[:expert]) + int(counts[expert]) for expert in range(experts)]


@pytest.mark.parametrize("pairs", [1, 37, 3000])
@pytest.mark.parametrize("tile", [16, 128])
def test_rows_are_grouped_by_expert(pairs: int, tile: int) -> None:
    count = 16
    ids = torch.randint(0, count, (pairs,), generator=torch.Generator().manual_seed(pairs)).to(torch.int32)
    pair_ids, expert_ids = (t.cpu() for t in group_pairs(ids.to(DEVICE), count, tile))
    assert sorted(pair_ids[pair_ids >= 0].tolist()) == list(range(pairs))
    for row, pair in enumerate(pair_ids.tolist()):
        if pair >= 0:
            assert expert_ids[row // tile] == ids[pair]
    assert all(e >= count for e, t in zip(expert_ids, pair_ids.view(-1, tile), strict=True) if (t < 0).all())


def attention_arguments(
    lengths: list[int], cached: list[int], page: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Of sequences whose pages are shuffled."""
    contexts = [n + before for n, before in zip(lengths, cached, strict=False)]
    needed = [-(-c // page) for c in contexts]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for row, blocks in zip(tables, order.split(needed), strict=True):  # type: ignore[no-untyped-call]
        row[: len(blocks)] = blocks
    keys, values = (draw(sum(needed), page, kv_heads, dim, dtype=dtype, seed=s) for s in (5, 6))
    qkv = draw(sum(lengths), heads + 2, dim, dtype=dtype)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return (
        qkv[:, :heads],
        keys,
        values,
        PagedSequences(
            tables.to(DEVICE),
            starts.to(DEVICE),
            torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
            max(lengths),
            max(contexts),
            tuple(zip(lengths, contexts, strict=True)),
        ),
        dim**-0.5,
    )


@BOTH
@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize("lengths", [[1, 1, 1], [1], [5, 1, 40], [130, 3], [16, 17]])
def test_attention_over_shuffled_pages(lengths: list[int], dtype: torch.dtype, ops: Ops) -> None:
    arguments = attention_arguments(lengths, [0, 100, 33], 16, 10, 2, 24, dtype)
    close(ops.paged_attention(*arguments), REFERENCE.paged_attention(*arguments))


@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize("last_merges", [False, True])
@pytest.mark.parametrize("share", [0, 30])
@pytest.mark.parametrize("programs", [1, 12, 1024])
def test_however_a_context_is_split(
    programs: int, share: int, last_merges: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = "FEW_SEQUENCES_PLAN", gpu_attention.MANY_SEQUENCES_PLAN
    plan = dataclasses.replace(many, programs=programs, share=share, last_merges=last_merges)
    monkeypatch.setattr(gpu_attention, few, plan)
    arguments = attention_arguments([1, 1], [14, 300], 16, 10, 2, 24, dtype)
    first = OPS.paged_attention(*arguments)
    close(first, REFERENCE.paged_attention(*arguments))
    # The counts are 0 again.
    assert torch.equal(OPS.paged_attention(*arguments), first)


@pytest.mark.parametrize(
    ("queries", "context", "shape"),
    [
        (64, 64, "SHORT_CHUNKS"),
        (65, 65, "CHUNKS"),
        (1024, 1024, "CHUNKS"),
        (512, 4096, "CHUNKS"),
        (1024, 8192, "LONG_CHUNKS"),
        (1664, 32768, "LONG_CHUNKS"),
        (2048, 32768, "CHUNKS"),
        (2049, 8192, "LONG_CHUNKS"),
    ],
)
def test_tiles_of_a_chunk_are_those_measured_fastest(queries: int, context: int, shape: str) -> None:
    """20 heads on an H200, which runs 264 programs at once."""
    assert gpu_attention.chunk_shape(queries, context, 20 / 264) == getattr(gpu_attention, shape)


@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize("sequences", [3, 60])
def test_those_that_decode_beside_a_chunk(sequences: int, dtype: torch.dtype) -> None:
    """Whatever the device computes at once, what comes behind both finds both results."""
    chunk = attention_arguments([200], [100], 16, 10, 2, 24, dtype)
    *decodes, paged, scale = attention_arguments([1] * sequences, [300] * sequences, 16, 10, 2, 24, dtype)
    decodes += [dataclasses.replace(paged, beside=True), scale]
    expected = [REFERENCE.paged_attention(*arguments) for arguments in (chunk, decodes)]
    for _ in range(20 if DEVICE == "cuda" else 1):
        results = [torch.full_like(one, float("nan")) for one in expected]
        for arguments in ((*chunk, results[0]), (*decodes, results[1])):
            OPS.paged_attention(*arguments)
        for result, wanted in zip(results, expected, strict=True):
            close(result + 0, wanted)


@BOTH
@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize(
    ("lengths", "page", "dim"), [([1, 1, 1], 16, 24), ([1] * 60, 16, 24), ([5, 1, 40], 16, 24), ([100, 70], 64, 32)]
)
def test_layer_after_layer(lengths: list[int], page: int, dim: int, dtype: torch.dtype, ops: Ops) -> None:
    """Launches of a layer serve the next, whose keys and values are elsewhere, by pages of the copy engine, too. One
    of the layers begins at an odd address, for which a kernel may have to be compiled anew."""
    query, keys, values, *rest = attention_arguments(lengths, [0, 100, 33] * 20, page, 4, 2, dim, dtype)
    launches: list[AttentionLaunch] = []
    out = torch.empty(query.shape, dtype=dtype, device=DEVICE)
    for layer in range(4):
        room = torch.empty(2, keys.numel() + 1, dtype=dtype, device=DEVICE)
        odd = layer == 2 and dim < 32
        moved = room[:, 1:] if odd else room[:, :-1].clone()
        cache = [
            each.view(keys.shape).copy_(own * (layer + 1)) for each, own in zip(moved, (keys, values), strict=True)
        ]
        out.fill_(float("nan"))
        arguments = [query, *cache, *rest, out, launches]
        attended = ops.paged_attention(*arguments)
        close(attended, REFERENCE.paged_attention(query, *cache, *rest))
        assert attended is out
        assert launches


@pytest.mark.parametrize("dtype", MAIN_DTYPES)
def test_what_lies_behind_a_context_is_not_read(dtype: torch.dtype) -> None:
    arguments = attention_arguments([1], [20], 16, 10, 2, 24, dtype)
    expected = OPS.paged_attention(*arguments)
    _, keys, values, paged, _ = arguments
    for cache in (keys, values):
        cache[paged.block_tables[0, 1], 5:] = float("nan")
    assert torch.equal(OPS.paged_attention(*arguments), expected)


@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize("cached", [[0, 0, 0], [70, 128, 1]])
def test_attention_to_pages_by_the_copy_engine(
    cached: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_attention, "CHUNKS", gpu_attention.PrefillShape(32, 16, 4, 2, pagewise=True))
    arguments = attention_arguments([130, 1, 33], cached, 16, 4, 2, 32, dtype)
    close(OPS.paged_attention(*arguments), REFERENCE.paged_attention(*arguments))


@pytest.mark.parametrize("dtype", MAIN_DTYPES)
@pytest.mark.parametrize(
    ("lengths", "cached", "prompts"),
    [([43], [0], 1), ([64], [0], 1), ([41], [1], 0), ([39], [0], 0), ([9, 41], [0, 0], 0)],
)
def test_the_library_attends_to_a_whole_prompt_alone(
    lengths: list[int], cached: list[int], prompts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded: 43 to 44; the kernel takes the others."""
    seen = []

    def spy(query: Tensor, *rest: Any) -> Tensor:
        seen.append(len(query))
        return whole_prompt.whole_prompt(query, *rest)

    monkeypatch.setattr(whole_prompt, "MIN_PROMPT", 40)
    monkeypatch.setattr(gpu_attention, "library_supports", lambda query: True)
    monkeypatch.setattr(gpu_attention, "whole_prompt", spy)
    arguments = attention_arguments(lengths, cached, 16, 4, 2, 32, dtype)
    close(OPS.paged_attention(*arguments), REFERENCE.paged_attention(*arguments))
    assert len(seen) == prompts


@pytest.mark.parametrize(("length", "planned"), [(2048, 2048), (2049, 2304), (5000, 5120), (8192, 8192), (8193, 9216)])
def test_prompts_are_padded_to_few_lengths(length: int, planned: int) -> None:
    assert whole_prompt.planned_length(length) == planned
