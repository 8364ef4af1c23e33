"""Triton operations of the vision tower against their torch references: on the GPU where there is one, else in Triton's
interpreter. On a GPU also whole passes, launched and as graphs, and the memory that they take."""

import dataclasses
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
from msgspec.structs import replace

from benchmarks.engine import CONFIG
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD, Grid, Patches
from services.mm_encoder.vision import ops
from services.mm_encoder.vision.encoder import Encoder
from services.mm_encoder.vision.graphs import padded
from services.mm_encoder.vision.kernels import attention, rowwise
from services.mm_encoder.vision.kernels.gpu import gpu_ops
from services.mm_encoder.vision.memory import LARGE_GRAPH_PATCHES, ROWS, pass_bytes
from services.mm_encoder.vision.pace import ALIGNED_TILES, WHOLE, Pace, pass_operations, pass_pace
from services.mm_encoder.vision.tables import Tables, host_tables, to_device
from services.mm_encoder.vision.tower import run_tower
from services.mm_encoder.vision.weights import Linear, load_weights
from shared.model.drawn_weights import DrawnWeights

# The interpreter keeps bfloat16 as its bits and cannot multiply matrices of it.
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
ON_A_CARD = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
HEADS = 2
FRAMES: list[Grid] = [(1, 8, 10), (2, 2, 2), (1, 16, 8), (1, 12, 12), (2, 8, 8)]  # 80, 4, 128, 144 and 64 rows


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def tables(head_dim: int, grids: list[Grid] = FRAMES) -> Tables:
    vision = replace(CONFIG.vision, hidden_size=HEADS * head_dim, num_heads=HEADS)
    return to_device(host_tables(grids, vision), vision, torch.device(DEVICE))


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    limit = 1e-5 if actual.dtype == torch.float32 else 1e-2
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < limit, f"relative error {error:.2e}"


@pytest.fixture(autouse=True)
def unfilled_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = new_empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [80, 64, 16, 32 + 16])
def test_attention_of_frames_of_any_size(head_dim: int, dtype: torch.dtype) -> None:
    """Frames of less than a tile, of whole tiles, of a part more; queries are overwritten, keys and values are not."""
    assert attention.supports(head_dim)
    own = tables(head_dim)
    qkv = draw(sum(own.frames), 3 * HEADS * head_dim, dtype=dtype)
    expected, before = qkv.float(), qkv.clone()
    ops.attend(expected, HEADS, own)
    width = HEADS * head_dim
    close(attention.attend(qkv, HEADS, own), expected[:, :width].to(dtype))
    assert torch.equal(qkv[:, width:], before[:, width:])


def test_attention_sees_its_own_frame_only() -> None:
    own = tables(80, [(1, 8, 8), (1, 8, 10), (1, 2, 2)])
    qkv = draw(sum(own.frames), 3 * HEADS * 80, dtype=DTYPES[0])
    other = qkv.clone()
    other[:64], other[144:] = 1e4, -1e4
    kept = attention.attend(qkv, HEADS, own)[64:144]
    assert torch.equal(attention.attend(other, HEADS, own)[64:144], kept)


def test_attention_of_large_scores_stays_finite() -> None:
    """Later keys far above the first ones, whose maximum the sum starts with, and far below."""
    own = tables(80, [(1, 16, 16)])
    qkv = draw(256, 3 * HEADS * 80, dtype=DTYPES[0])
    qkv[:64, 160:320] *= 30
    qkv[64:128, 160:320] *= 0.01
    expected = qkv.float()
    ops.attend(expected, HEADS, own)
    close(attention.attend(qkv, HEADS, own), expected[:, :160].to(qkv.dtype))


def test_tiles_without_rows_are_nothing() -> None:
    own = tables(80)
    rows = sum(own.frames)
    qkv = draw(rows + 70, 3 * HEADS * 80, dtype=DTYPES[0])
    expected = qkv.clone()
    attention.attend(expected[:rows], HEADS, own)
    attention.attend(qkv, HEADS, dataclasses.replace(own, tiles=padded(own.tiles, len(own.tiles) + 5)))
    assert torch.equal(qkv, expected), "and rows of no frame stay as they are"


@pytest.mark.parametrize("head_dim", [8, 72, 40, 88])
def test_heads_that_the_kernel_cannot_split(head_dim: int) -> None:
    assert not attention.supports(head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 100), (5, 1280)])
@pytest.mark.parametrize("adds", [False, True])
def test_add_norm(rows: int, width: int, adds: bool, dtype: torch.dtype) -> None:
    x, more = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype, seed=1) if adds else None
    norm = Linear(draw(width, dtype=dtype, seed=2), draw(width, dtype=dtype, seed=3))
    same = x.clone()
    close(rowwise.add_norm(x, more, norm, 1e-6), ops.add_norm(same, more, norm, 1e-6))
    assert torch.equal(x, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [80, 16])
def test_rotate(head_dim: int, dtype: torch.dtype) -> None:
    own = tables(head_dim)
    qkv = draw(sum(own.frames), 3 * HEADS * head_dim, dtype=dtype)
    expected = qkv.clone()
    ops.rotate(expected, HEADS, own)
    rowwise.rotate(qkv, HEADS, own)
    close(qkv, expected)
    assert torch.equal(qkv[:, 2 * HEADS * head_dim :], expected[:, 2 * HEADS * head_dim :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 1024), (3, 2500)])
def test_quick_gelu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = 20 * draw(rows, width, dtype=dtype)
    expected = x.float()
    ops.quick_gelu(expected)
    rowwise.quick_gelu(x)
    close(x, expected.to(dtype))


class Pieces(Pace):
    """A pace that cuts as often as can be, and counts."""

    def __init__(self) -> None:
        self.sent = 0
        self.operations = 0.0

    def cut(self, costs: Sequence[float]) -> list[slice]:
        return [slice(at, at + 1) for at in range(len(costs))]

    def spend(self, operations: float) -> None:
        self.sent += 1
        self.operations += operations


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_in_pieces_has_the_same_bits(dtype: torch.dtype) -> None:
    """Attention a few tiles at a time, with a pause after it and after each span of rows."""
    vision = replace(CONFIG.vision, hidden_size=HEADS * 80, num_heads=HEADS, depth=2, intermediate_size=96)
    config = replace(CONFIG, vision=vision, dtype=str(dtype).removeprefix("torch."))
    weights = load_weights(DrawnWeights(torch.device("cpu")), config, DEVICE).tower
    host = host_tables(FRAMES, vision)
    own = to_device(host, vision, torch.device(DEVICE))
    rows = draw(sum(own.frames), vision.hidden_size, dtype=dtype)
    whole, cut, pace = rows.clone(), rows.clone(), Pieces()
    run_tower(whole, own, weights, vision, gpu_ops(), 100, WHOLE)
    run_tower(cut, own, weights, vision, gpu_ops(), 100, pass_pace(pace, host, vision))
    assert not torch.equal(whole, rows)
    assert torch.equal(cut, whole)
    assert len(host.tiles) > ALIGNED_TILES
    assert pace.sent == vision.depth * (-(-len(host.tiles) // ALIGNED_TILES) + -(-len(rows) // 100))
    assert pace.operations == pytest.approx(pass_operations(host, vision))


def media(grids: list[Grid], seed: int = 0) -> list[Patches]:
    chance = np.random.default_rng(seed)
    return [Patches(chance.integers(0, 256, (t * h * w, 588), np.uint8), (t, h, w)) for t, h, w in grids]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    weights = load_weights(DrawnWeights(torch.device("cpu")), CONFIG, "cuda")
    return Encoder(weights, CONFIG, "cuda", 8192, CLIP_MEAN, CLIP_STD)


@pytest.fixture(scope="module")
def plain() -> Encoder:
    """The same with torch's operations, in float32."""
    config = replace(CONFIG, dtype="float32")
    weights = load_weights(DrawnWeights(torch.device("cpu")), config, "cuda")
    return Encoder(weights, config, "cuda", 1 << 20, CLIP_MEAN, CLIP_STD)


@ON_A_CARD
def test_whole_passes_agree_with_float32_on_a_card(encoder: Encoder, plain: Encoder) -> None:
    """Images and a video in several passes, cut at other places."""
    items = media([(1, 32, 32), (1, 74, 66), (8, 46, 44), (1, 4, 4), (2, 8, 8), (1, 100, 98)])
    for one, other in zip(encoder.encode(items), plain.encode(items), strict=True):
        error = (one.float() - other).norm() / other.norm()
        assert error < 0.05, f"relative error {error:.2e}"


@ON_A_CARD
@pytest.mark.parametrize("grids", [[(1, 32, 32)], [(1, 30, 34), (1, 2, 2)], [(4, 8, 8), (1, 6, 8)], [(1, 90, 90)]])
def test_a_graph_computes_what_launches_do(encoder: Encoder, grids: list[Grid]) -> None:
    """Of whole sizes and padded ones; between two runs other pixels and other frames go through the same graphs."""
    first, second = media(grids), media(grids, seed=1)
    graphs = encoder._graphs
    assert graphs is not None
    assert graphs.takes(host_tables(grids, CONFIG.vision))
    encoder._graphs = None
    expected = [torch.cat(encoder.encode(items)) for items in (first, second)]
    encoder._graphs = graphs
    for items, result in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
        found = torch.cat(encoder.encode(items))
        assert (found - result).float().norm() <= 2e-2 * result.float().norm()
        encoder.encode(media([(1, 16, 62), (1, 4, 4)], seed=2))


@ON_A_CARD
def test_an_encoder_that_sends_pieces_gives_the_same_bits(encoder: Encoder) -> None:
    """Of a pass that is launched, and of one that is captured: 2,048 rows, and a graph for every two layers."""
    grids: list[Grid] = [(1, 100, 98), (2, 32, 32)]
    items, vision = media(grids), CONFIG.vision
    whole = encoder.encode(items)
    encoder._pace = pace = Pieces()
    cut = encoder.encode(items)
    of_both, sent = pace.operations, pace.sent
    encoder.encode(items[1:])
    encoder._pace = Pace()
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))
    assert of_both == pytest.approx(sum(pass_operations(host_tables([grid], vision), vision) for grid in grids))
    assert pace.sent - sent == vision.depth // 2 + 1


@ON_A_CARD
def test_many_small_frames_are_launched(encoder: Encoder) -> None:
    """More tiles than a graph has: each frame has at least one."""
    assert encoder._graphs is not None
    grids: list[Grid] = [(2, 2, 2)] * 200
    assert not encoder._graphs.takes(host_tables(grids, CONFIG.vision))
    one, many = encoder.encode(media(grids[:1]))[0], encoder.encode(media(grids[:1]) + media(grids[1:], seed=1))[0]
    assert (one - many).float().norm() <= 2e-2 * one.float().norm()


@ON_A_CARD
@pytest.mark.parametrize("grid", [(1, 100, 98), (1, 240, 272)])
def test_a_pass_on_a_card_holds_what_is_said(encoder: Encoder, grid: Grid) -> None:
    items, rows = media([grid]), encoder._at_once
    encoder._at_once = ROWS
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    encoder.encode(items)
    encoder._at_once = rows
    taken = torch.cuda.max_memory_allocated() - before
    assert grid[1] * grid[2] > LARGE_GRAPH_PATCHES
    said = pass_bytes(CONFIG, grid[1] * grid[2])
    assert 0.97 * said <= taken <= 1.03 * said
