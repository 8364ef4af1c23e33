"""Sampling defaults of generation_config.json: applied, or named in an error or a warning."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from shared.errors import CheckpointError
from shared.model.generation import GenerationDefaults, load_generation_defaults


def write(directory: Path, generation: dict[str, Any]) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, GenerationDefaults(1.0, 0.7, 0, 1.0, 0.0, 0.0)),
        ({}, GenerationDefaults(1.0, 1.0, 0, 1.0, 0.0, 0.0)),
        ({"top_p": 0.8, "top_k": None, "temperature": 0}, GenerationDefaults(0.0, 0.8, 0, 1.0, 0.0, 0.0)),
        (
            {"top_k": 20, "repetition_penalty": 1.05, "presence_penalty": 0.5, "frequency_penalty": -1},
            GenerationDefaults(1.0, 1.0, 20, 1.05, 0.5, -1.0),
        ),
        ({"do_sample": False}, GenerationDefaults(0.0, 1.0, 0, 1.0, 0.0, 0.0)),
        ({"do_sample": True, "temperature": 0.6}, GenerationDefaults(0.6, 1.0, 0, 1.0, 0.0, 0.0)),
        ({"decode_strategy": "greedy_search"}, GenerationDefaults(0.0, 1.0, 0, 1.0, 0.0, 0.0)),
        ({"decode_strategy": "sampling", "temperature": 0.6}, GenerationDefaults(0.6, 1.0, 0, 1.0, 0.0, 0.0)),
        ({"min_p": 0.05}, GenerationDefaults(1.0, 1.0, 0, 1.0, 0.0, 0.0, min_p=0.05)),
        (
            {"penalty_score": 1.2, "presence_score": 0.25, "frequency_score": 0.75},
            GenerationDefaults(1.0, 1.0, 0, 1.2, 0.25, 0.75),
        ),
        (
            {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "transformers_version": "4.57.1"},
            GenerationDefaults(1.0, 1.0, 0, 1.0, 0.0, 0.0),
        ),
    ],
)
def test_generation_defaults(tmp_path: Path, generation: dict[str, Any] | None, expected: GenerationDefaults) -> None:
    if generation is not None:
        write(tmp_path, generation)
    assert load_generation_defaults(tmp_path) == expected


@pytest.mark.parametrize(
    ("generation", "line"),
    [
        ({"top_k": -1}, "top_k is -1; 0 is taken, which is the same: off"),
        ({"max_new_tokens": 512}, "not applied: max_new_tokens 512; a request limits its answer by max_tokens"),
        (
            {"max_new_tokens": 512, "max_length": 9},
            "not applied: max_new_tokens 512, max_length 9; a request limits its answer by max_tokens",
        ),
        ({"num_beams": 4, "colour": "red", "nothing": None}, "not applied: colour, num_beams"),
        ({"decode_strategy": "beam_search"}, "not applied: decode_strategy 'beam_search'"),
    ],
)
def test_what_of_a_generation_config_is_not_applied_has_one_line(
    tmp_path: Path, generation: dict[str, Any], line: str
) -> None:
    """And the rest of the file is."""
    defaults = load_generation_defaults(write(tmp_path, generation | {"top_p": 0.8}))
    warnings = (f"{tmp_path}/generation_config.json: {line}",)
    assert defaults == GenerationDefaults(1.0, 0.8, 0, 1.0, 0.0, 0.0, warnings=warnings)


@pytest.mark.parametrize("do_sample", [False, True])
def test_do_sample_is_transformers_do_sample(tmp_path: Path, do_sample: bool) -> None:
    generation = {"do_sample": do_sample, "temperature": 0.7, "top_p": 0.9}
    greedy = GenerationConfig(**generation).get_generation_mode() == GenerationMode.GREEDY_SEARCH
    defaults = load_generation_defaults(write(tmp_path, generation))
    assert (defaults.temperature == 0) == greedy
    assert len(defaults.warnings) == int(greedy)
    assert "temperature 0.7 is not applied" in "".join(defaults.warnings) or not greedy


@pytest.mark.parametrize(
    ("generation", "named"),
    [
        ({"repetition_penalty": 1.1, "penalty_score": 1.2}, "repetition_penalty is 1.1, penalty_score is 1.2"),
        ({"presence_penalty": 1, "presence_score": 0}, "presence_penalty is 1.0, presence_score is 0.0"),
        ({"do_sample": False, "decode_strategy": "sampling"}, "do_sample is False, do_sample by decode_strategy is T"),
    ],
)
def test_two_names_of_one_default_agree(tmp_path: Path, generation: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {named}"):
        load_generation_defaults(write(tmp_path, generation))


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty"])
def test_mistyped_generation_defaults_are_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{field}"):
        load_generation_defaults(write(tmp_path, {field: "high"}))


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1), ("top_p", 1.5), ("top_k", -2), ("repetition_penalty", 0), ("min_p", 2)]
)
def test_generation_defaults_out_of_range_are_named(tmp_path: Path, field: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=field):
        load_generation_defaults(write(tmp_path, {field: value}))
