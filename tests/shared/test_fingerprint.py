"""Facts of a replica, by what changes them."""

from pathlib import Path

import pytest

from services.engine.settings import EngineSettings
from services.mm_encoder.settings import MmEncoderSettings
from services.postproc.settings import PostprocSettings
from shared.config import CommonSettings
from shared.fingerprint import facts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "model.safetensors").write_bytes(bytes(100_000))
    return tmp_path


def of(model: Path, kind: type[CommonSettings] = CommonSettings, **changes: object) -> dict[str, str]:
    return facts(kind(redis_url="", model=str(model), **changes))  # type: ignore[arg-type]


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_the_same_is_the_same(model: Path) -> None:
    assert of(model) == of(model, lease_ms=5)
    assert of(model).keys() == {"config.json", "tokenizer", "weights", "max_model_len", "shards"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_another_file_is_another_fact(model: Path, name: str) -> None:
    before = of(model)
    data = bytearray((model / name).read_bytes())
    data[-1] ^= 1
    data[0] ^= 1
    (model / name).write_bytes(data)
    assert changed(before, of(model)) == {
        {"config.json": "config.json", "tokenizer.model": "tokenizer", "model.safetensors": "weights"}[name]
    }


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (CommonSettings, "max_model_len", 64),
        (CommonSettings, "shards", 3),
        (EngineSettings, "quantization", "wint4"),
        (MmEncoderSettings, "mm_processor_kwargs", {"image_max_pixels": 50176}),
        (PostprocSettings, "reasoning_parser", ""),
        (PostprocSettings, "tool_calls_in_reasoning", False),
    ],
)
def test_a_setting_that_changes_answers_is_a_fact(
    model: Path, kind: type[CommonSettings], setting: str, value: object
) -> None:
    if setting == "mm_processor_kwargs":
        from services.mm_encoder.media.processor_settings import ProcessorSettings

        value = ProcessorSettings(image_max_pixels=50176)
    assert changed(of(model, kind), of(model, kind, **{setting: value})) == {setting}


def test_a_directory_without_weights_says_nothing_of_them(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "weights" not in of(model)
