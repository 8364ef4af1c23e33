"""A model and a tokenizer that do not belong together are told apart before anything is embedded."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from cli.demo import write_demo
from shared.errors import CheckpointError
from shared.model_config import ModelConfig, load_model_config
from shared.tokenizer import Tokenizer
from shared.vocabulary import check_vocabulary

MODEL = Path("model")  # as messages name it
Pair = tuple[ModelConfig, Tokenizer]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(directory)
    return load_model_config(directory), Tokenizer.load(directory)


def test_the_demos_belong_together(pair: Pair) -> None:
    assert check_vocabulary(MODEL, *pair) == ()


def test_a_needed_token_without_a_row(pair: Pair) -> None:
    config, tokenizer = pair
    last = tokenizer.control["<|VIDEO_END|>"]
    assert last == tokenizer.vocab_size - 1
    with pytest.raises(CheckpointError, match=f"has the id {last}, .* vocab_size is {last}"):
        check_vocabulary(MODEL, replace(config, vocab_size=last), tokenizer)


def test_text_without_a_row(pair: Pair) -> None:
    config, tokenizer = pair
    with pytest.raises(CheckpointError, match="has the id 900, for which the embedding has no row"):
        check_vocabulary(MODEL, replace(config, vocab_size=900), tokenizer)


def test_other_control_tokens_without_a_row_are_a_warning(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokenizer = pair
    rows = tokenizer.vocab_size
    monkeypatch.setattr(tokenizer, "_control", {**tokenizer.control, "<|EXTRA|>": rows})
    monkeypatch.setattr(tokenizer, "_bytes", [*tokenizer._bytes, b""])
    (warning,) = check_vocabulary(MODEL, replace(config, vocab_size=rows), tokenizer)
    assert warning == f"model: the tokenizer's <|EXTRA|>: no row in the embedding of {rows}"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("image_patch_id", "im_patch_id"),
        ("image_start_id", "image_start_token_id"),
        ("video_end_id", "video_end_token_id"),
    ],
)
def test_media_tokens_with_other_ids(pair: Pair, name: str, field: str) -> None:
    config, tokenizer = pair
    with pytest.raises(CheckpointError, match=f"config.json's {field} is 1601 and the tokenizer's id"):
        check_vocabulary(MODEL, replace(config, **{name: 1601}), tokenizer)
