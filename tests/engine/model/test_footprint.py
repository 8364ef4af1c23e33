"""The decoder's memory by headers: what loading it really takes, and what the published model is known to have."""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import hub_files
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from cli.demo import write_demo
from services.engine.model import weights as loader
from services.engine.model.inputs import KVCache
from services.engine.model.split import Split
from services.engine.model.weights import load_weights
from services.engine.run.footprint import cache_bytes, decoder_shapes, weight_bytes
from services.mm_encoder.vision.memory import weight_bytes as vision_bytes
from shared.model.checkpoint import Checkpoint
from shared.model.config import load_model_config
from shared.model.config_file import Quantization
from shared.model.division import divided
from shared.model.drawn_weights import DrawnWeights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(directory)
    return directory


def storages(part: object) -> dict[int, int]:
    """Bytes of every tensor inside, by where they are: a head that is the embedding counts once."""
    if isinstance(part, Tensor):
        return {part.data_ptr(): part.nbytes}
    parts = part if isinstance(part, tuple) else ()
    if is_dataclass(part):
        parts = tuple(getattr(part, field.name) for field in fields(part))
    return {place: size for each in parts for place, size in storages(each).items()}


@pytest.mark.parametrize("both", [False, True], ids=["one form", "both forms"])
@pytest.mark.parametrize("quantization", [None, "wint8", "wint4"])
def test_what_loading_takes(
    demo: Path, monkeypatch: pytest.MonkeyPatch, quantization: Quantization | None, both: bool
) -> None:
    config = load_model_config(demo)
    monkeypatch.setattr(loader, "has_spare_memory", lambda device: both)
    loaded = load_weights(Checkpoint(demo), config, torch.bfloat16, CPU, quantization)
    monkeypatch.undo()
    stored = decoder_shapes(Checkpoint(demo, headers_only=True), config)
    # The demo's head is stored and equals the embedding, which headers do not show.
    expected = sum(storages(loaded).values()) + loaded.embedding.nbytes
    assert weight_bytes(stored, quantization, both=both) == expected


def test_one_token_of_the_cache(demo: Path) -> None:
    config = load_model_config(demo)
    cache = KVCache.allocate(config.num_layers, 3, 16, config.num_kv_heads, config.head_dim, torch.bfloat16, "cpu")
    assert cache_bytes(config) * 3 * 16 == cache.keys.nbytes + cache.values.nbytes


class Published(Checkpoint):
    """A checkpoint that has every tensor it is asked for, but for a head of its own."""

    def __init__(self) -> None:
        self.parameters = 0

    def get(self, name: str, shape: Sequence[int]) -> Tensor:
        tensor = torch.empty(tuple(shape), device="meta")
        self.parameters += tensor.numel()
        return tensor

    def integers(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        """Nothing is stored quantised."""

    def has(self, name: str) -> bool:
        return False

    def check_all_used(self, prefixes: Sequence[str]) -> None:
        pass


def test_the_published_model(tmp_path: Path) -> None:
    """29,399,294,336 parameters with a tied head, as the hub counts them."""
    (tmp_path / "config.json").write_text(json.dumps(hub_files.thinking()))
    config, checkpoint = load_model_config(tmp_path), Published()
    stored = decoder_shapes(checkpoint, config)
    assert checkpoint.parameters + vision_bytes(config) // 2 == 29_399_294_336
    routers = 27 * 2 * 64 * (2560 + 1)  # in 32 bits
    assert weight_bytes(stored, None) == 2 * (checkpoint.parameters + routers)
    sizes = [weight_bytes(stored, "wint4", both=True), weight_bytes(stored, "wint8", both=True)]
    # As an H200 measured them (docs/engine-performance.md), with what the allocator rounds up.
    measured = pytest.approx([16.70, 29.27, 53.50], rel=0.005)
    assert [size / 2**30 for size in (*sizes, weight_bytes(stored, None))] == measured
    assert cache_bytes(config) == 57_344


@pytest.mark.parametrize("quantization", [None, "wint8", "wint4"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_ranks(demo: Path, size: int, quantization: Quantization | None) -> None:
    config = replace(load_model_config(demo), num_kv_heads=4)
    drawn = DrawnWeights(CPU)
    loaded = load_weights(drawn, config, torch.bfloat16, CPU, quantization, Split(size - 1, size))
    stored = load_weights(Published(), config, torch.bfloat16, torch.device("meta"), None, Split(0, size))
    assert weight_bytes(stored, quantization) == sum(storages(loaded).values())
    assert cache_bytes(divided(config, size)) * size == cache_bytes(config)
