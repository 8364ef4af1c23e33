"""The vision tower and the resampler against transformers, on a checkpoint transformers has written."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from machine import has_reproducible_products
from msgspec.structs import replace as changed
from oracle import Model, save_with_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.engine import CONFIG
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD, Grid, Patches
from services.mm_encoder.vision import ops
from services.mm_encoder.vision.encoder import Encoder, plan_passes
from services.mm_encoder.vision.graphs import Captured, Cuts, Graph, capture_sizes, padded
from services.mm_encoder.vision.normalise import normalise
from services.mm_encoder.vision.pace import WHOLE, Pace, PassPace
from services.mm_encoder.vision.tables import HostTables, host_tables, to_device
from services.mm_encoder.vision.weights import load_weights
from shared.errors import CheckpointError
from shared.model.checkpoint import Checkpoint
from shared.model.config import ModelConfig, load_model_config

IMAGES: list[Grid] = [(1, 4, 4), (1, 8, 10), (1, 2, 20), (1, 8, 10), (1, 6, 4)]
VIDEOS: list[Grid] = [(6, 6, 8), (2, 4, 4), (10, 4, 6)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model") / "small"


@pytest.fixture(scope="module")
def judge(directory: Path) -> Model:
    return save_with_transformers(directory)


@pytest.fixture(scope="module")
def config(directory: Path, judge: Model) -> ModelConfig:
    return load_model_config(directory)


def encoder(directory: Path, config: ModelConfig, max_patches: int = 100_000, at_once: int | None = None) -> Encoder:
    weights = load_weights(Checkpoint(directory), config, "cpu")
    return Encoder(weights, config, "cpu", max_patches, CLIP_MEAN, CLIP_STD, at_once=at_once)


def media(grids: list[Grid], seed: int = 0) -> list[Patches]:
    draw = np.random.default_rng(seed)
    return [Patches(draw.integers(0, 256, (t * h * w, 588), dtype=np.uint8), (t, h, w)) for t, h, w in grids]


class Told(Pace):
    """A pace that remembers."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def begin(self) -> None:
        self.begun.append("batch")

    def begin_pass(self) -> None:
        self.begun.append("pass")


def test_the_pace_hears_of_each_pass(directory: Path, config: ModelConfig, judge: Model) -> None:
    told = encoder(directory, config, 100)
    told._pace = pace = Told()
    for _ in range(2):
        told.encode(media([(10, 4, 6), (1, 4, 4)]))
    assert pace.begun == 2 * ["batch", "pass", "pass", "pass"]


def pixels(items: list[Patches], dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.from_numpy(np.concatenate([item.rows for item in items]))
    return normalise(rows, torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD), dtype)


def judged(judge: Model, items: list[Patches], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """transformers' embeddings, one tensor per item; `items` are all images or all videos."""
    grids = torch.tensor([item.grid for item in items])
    features = judge.get_image_features if items[0].grid[0] == 1 else judge.get_video_features
    with torch.no_grad():
        return list(features(pixels(items, dtype), grids).pooler_output)


def agree(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        assert other.abs().max() > 0.5, "the judge's embeddings say something"
        assert (one - other).abs().max() <= tolerance


@pytest.mark.parametrize("grid", [*IMAGES[:3], (1, 30, 22)])
def test_one_image(directory: Path, judge: Model, config: ModelConfig, grid: Grid) -> None:
    items = media([grid])
    agree(encoder(directory, config).encode(items), judged(judge, items))


def test_several_images_of_different_sizes(directory: Path, judge: Model, config: ModelConfig) -> None:
    items = media(IMAGES)
    agree(encoder(directory, config).encode(items), judged(judge, items))


@pytest.mark.parametrize("grid", VIDEOS)
def test_one_video(directory: Path, judge: Model, config: ModelConfig, grid: Grid) -> None:
    items = media([grid])
    agree(encoder(directory, config).encode(items), judged(judge, items))


@pytest.mark.parametrize("max_patches", [1, 40, 96, 97, 200, 10_000])
def test_the_size_of_a_pass_changes_nothing(
    directory: Path, judge: Model, config: ModelConfig, max_patches: int
) -> None:
    images, videos = media(IMAGES), media(VIDEOS, seed=1)
    mixed = [images[0], videos[0], *images[1:4], *videos[1:], images[4]]
    expected_images, expected_videos = judged(judge, images), judged(judge, videos)
    expected = [expected_images[0], expected_videos[0], *expected_images[1:4], *expected_videos[1:], expected_images[4]]
    agree(encoder(directory, config, max_patches).encode(mixed), expected)


@pytest.mark.skipif(not has_reproducible_products(), reason="another processor than those tried")
def test_embeddings_are_the_same_bits_in_any_company(directory: Path, config: ModelConfig) -> None:
    items, ours = [*media(IMAGES), *media(VIDEOS, seed=1)], encoder(directory, config)
    alone = [ours.encode([item])[0] for item in items]
    together, reversed_order = ours.encode(items), ours.encode(items[::-1])[::-1]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(alone, reversed_order, strict=True))


def test_rows_that_fill_a_graph_up_change_nothing(directory: Path, judge: Model, config: ModelConfig) -> None:
    items, ours = [*media(IMAGES), *media(VIDEOS, seed=1)], encoder(directory, config)
    host = host_tables([item.grid for item in items], config.vision)
    rows = torch.from_numpy(np.concatenate([item.rows for item in items]))
    expected = ours._run(ours._embed(rows), to_device(host, config.vision, torch.device("cpu")))
    fuller = HostTables(
        host.frames,
        padded(host.places, len(rows) + 20),
        padded(host.tiles, 90),
        padded(host.pairs, len(host.pairs) + 5),
    )
    found = ours._run(ours._embed(torch.cat([rows, rows[:20]])), to_device(fuller, config.vision, torch.device("cpu")))
    assert (found[: len(expected)] - expected).abs().max() <= 1e-5


def test_sizes_of_graphs_are_a_quarter_of_a_power_of_two_apart() -> None:
    assert capture_sizes(1024) == [256, 512, 768, 1024]
    assert capture_sizes(8192)[4:] == [1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192]


class Captures:
    """Counts what is captured and replayed, in order."""

    def __init__(self) -> None:
        self.open = 0
        self.replayed = list[object]()

    def begin(self) -> Graph:
        self.open += 1
        assert self.open == 1, "one capture at a time"
        return CapturedOnly(self)


class CapturedOnly(Graph):
    def __init__(self, captures: Captures) -> None:
        self._captures = captures

    def capture_end(self) -> None:
        self._captures.open -= 1

    def replay(self) -> None:
        self._captures.replayed.append(self)


@pytest.mark.parametrize(
    ("rows", "layers"), [(256, [16, 16, 0]), (1024, [4] * 8 + [0]), (1280, [4] * 8 + [0]), (1792, [3] * 10 + [2])]
)
def test_a_captured_pass_is_graphs_of_some_layers(rows: int, layers: list[int]) -> None:
    """The last one has the resampler, too. An engine is thought of between two, and the parts make the whole."""
    captures = Captures()
    cuts = Cuts(captures.begin)
    pace = PassPace(cuts, WHOLE.attention, 1.0)
    for _ in range(32):
        for _, operations in pace.attention:
            pace.pace.spend(operations)
        pace.spend(slice(0, rows))
    cuts.end()
    assert cuts.rows == [rows * some for some in layers]
    assert captures.open == 0
    heard = Heard()
    out = torch.zeros(1)
    assert Captured(cuts.graphs, [some / 32 for some in layers], out).run(heard, 640.0) is out
    assert captures.replayed == cuts.graphs
    assert heard.spent == pytest.approx([20 * some for some in layers])


class Heard(Pace):
    def __init__(self) -> None:
        self.spent = list[float]()

    def spend(self, operations: float) -> None:
        self.spent.append(operations)


def test_tiles_cover_each_frame_and_no_row_of_another() -> None:
    tiles = host_tables([(2, 2, 2), (1, 16, 16), (1, 2, 130)], CONFIG.vision).tiles.tolist()
    assert tiles == [
        *([0, 0, 4], [4, 4, 8], [8, 8, 264], [136, 8, 264]),
        *([264, 264, 524], [392, 264, 524], [520, 264, 524]),
    ]


@pytest.mark.parametrize("rows", [1, 3, 16, 50])
def test_how_many_rows_are_in_work_changes_nothing(
    directory: Path, judge: Model, config: ModelConfig, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """From parts of a frame to several frames at a time."""
    images, videos = media(IMAGES), media(VIDEOS, seed=1)
    expected = judged(judge, images) + judged(judge, videos)
    monkeypatch.setattr(ops, "ROWS", rows)
    agree(encoder(directory, config, at_once=rows).encode([*images, *videos]), expected)


def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_is(
    tmp_path: Path, judge: Model, directory: Path, config: ModelConfig
) -> None:
    """No two orders of rounding agree closely in 8 bits; the error against float32 is what must not be worse."""
    items = media(IMAGES)
    exact = judged(judge, items)
    low = save_with_transformers(tmp_path / "low", torch.bfloat16)
    low_config = load_model_config(tmp_path / "low")
    ours = encoder(tmp_path / "low", low_config).encode(items)
    theirs = judged(low, items, torch.bfloat16)
    assert all(one.dtype == torch.bfloat16 for one in ours)

    def error(found: list[Tensor]) -> float:
        return math.sqrt(sum(float((a.float() - b).square().sum()) for a, b in zip(found, exact, strict=True)))

    assert error(ours) <= 1.2 * error(theirs)


@pytest.mark.parametrize("max_patches", [1, 7, 64, 96, 200, 1000])
def test_passes_are_bounded_and_whole(max_patches: int) -> None:
    grids = [*IMAGES, *VIDEOS, (180, 8, 8), (1, 40, 40)]
    passes = plan_passes(grids, max_patches, 2)
    pieces = [piece for each in passes for piece in each]
    for item, (t, h, w) in enumerate(grids):
        own = sorted((piece for piece in pieces if piece.item == item), key=lambda piece: piece.start)
        assert [piece.start for piece in own] == [0, *(piece.stop for piece in own[:-1])]
        assert own[-1].stop == t * h * w
        assert all(piece.stop - piece.start == piece.grid[0] * h * w for piece in own)
        assert all(piece.grid[0] % 2 == 0 or t == 1 for piece in own), "no pair of frames is torn"
    for each in passes:
        least = max(2 * h * w if t > 1 else h * w for t, h, w in (piece.grid for piece in each))
        assert sum(piece.stop - piece.start for piece in each) <= max(max_patches, least)
        assert len(each) == 1 or sum(piece.stop - piece.start for piece in each) <= max_patches


def test_identity_tells_weights_and_dtype_apart(
    directory: Path, judge: Model, config: ModelConfig, tmp_path: Path
) -> None:
    save_with_transformers(tmp_path / "other", seed=1)
    ours = load_weights(Checkpoint(directory), config, "cpu").identity
    assert ours == load_weights(Checkpoint(directory), config, "cpu").identity
    assert ours != load_weights(Checkpoint(tmp_path / "other"), config, "cpu").identity


def test_buffers_of_rotary_frequencies_change_nothing(
    directory: Path, judge: Model, config: ModelConfig, tmp_path: Path
) -> None:
    tensors = {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}
    more = tensors | {"vision_model.rotary_pos_emb.inv_freq": torch.ones(4)}
    save_file(more, tmp_path / "model.safetensors")
    expected = load_weights(Checkpoint(directory), config, "cpu").identity
    assert load_weights(Checkpoint(tmp_path), config, "cpu").identity == expected


class Renaming:
    """A checkpoint without one tensor, or with one too many."""

    def __init__(self, checkpoint: Checkpoint, missing: str = "") -> None:
        self._checkpoint = checkpoint
        self._missing = missing

    def get(self, name: str, shape: object) -> Tensor:
        return self._checkpoint.get(f"{name}.absent" if name == self._missing else name, shape)  # type: ignore[arg-type]

    def check_all_used(self, prefixes: object) -> None:
        self._checkpoint.check_all_used(prefixes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["vision_model.patch_embed.proj.weight", "vision_model.ln.bias", "model.resampler_model.mlp.bias"]
)
def test_a_missing_tensor_is_named(directory: Path, judge: Model, config: ModelConfig, name: str) -> None:
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_weights(Renaming(Checkpoint(directory), name), config, "cpu")  # type: ignore[arg-type]


def test_a_tensor_nobody_asks_for_is_an_error(directory: Path, judge: Model, config: ModelConfig) -> None:

    shallow = changed(config, vision=changed(config.vision, depth=config.vision.depth - 1))
    with pytest.raises(CheckpointError, match=r"unexpected tensors vision_model\.blocks\.1"):
        load_weights(Checkpoint(directory), shallow, "cpu")


def test_a_misshapen_tensor_is_an_error(directory: Path, judge: Model, config: ModelConfig) -> None:

    wide = changed(config, hidden_size=config.hidden_size + 1)
    with pytest.raises(CheckpointError, match="shape"):
        load_weights(Checkpoint(directory), wide, "cpu")
