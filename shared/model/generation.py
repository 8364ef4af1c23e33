"""Sampling defaults of a checkpoint: generation_config.json, else the reference server's."""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from shared.errors import CheckpointError
from shared.model.config_file import LARGEST, Finite, Positive, agreed, convert, read_object


class GenerationDefaults(msgspec.Struct, frozen=True):
    """Sampling defaults: those of generation_config.json, else the reference server's."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_p: float = 0.0
    warnings: tuple[str, ...] = ()  # fields ignored; each names the file and the field


def load_generation_defaults(directory: Path) -> GenerationDefaults:
    """Read the sampling defaults of requests.

    The reference server falls back to top_p 0.7 only if there is no generation_config.json; in a file, a missing field
    means "off", and a missing `do_sample` means sampling.

    Raises:
        CheckpointError: a field of generation_config.json is mistyped or out of range; the message names it.
    """
    path = directory / "generation_config.json"
    raw = read_object(path)
    if raw is None:
        return GenerationDefaults(1.0, 0.7, 0, 1.0, 0.0, 0.0)
    raw = {key: value for key, value in raw.items() if value is not None}
    warnings: list[str] = []
    try:
        defaults = _generation_defaults(convert(raw, _Generation, ""), raw, warnings)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return msgspec.structs.replace(defaults, warnings=tuple(f"{path}: {text}" for text in warnings))


class _Generation(msgspec.Struct):
    """Fields of generation_config.json; a missing field switches nothing on. The `_score` names are Paddle's."""

    do_sample: bool | None = None
    decode_strategy: str | None = None  # Paddle's do_sample
    temperature: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)] = 1.0
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = 0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Positive | None = None
    penalty_score: Positive | None = None
    presence_penalty: Finite | None = None
    presence_score: Finite | None = None
    frequency_penalty: Finite | None = None
    frequency_score: Finite | None = None


# Fields of generation_config.json that do not affect sampling: read elsewhere, or transformers' bookkeeping.
_NOT_SAMPLING = {
    *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache"),
    *("_from_model_config", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
    *("output_hidden_states", "cache_implementation", "cache_config"),
}
_LENGTHS = ("max_new_tokens", "max_length")


def _generation_defaults(given: _Generation, raw: dict[str, Any], warnings: list[str]) -> GenerationDefaults:
    if given.top_k == -1:
        warnings.append("top_k is -1; 0 is taken, which is the same: off")
    if lengths := [f"{name} {raw[name]}" for name in _LENGTHS if name in raw]:
        warnings.append(f"not applied: {', '.join(lengths)}; a request limits its answer by max_tokens")
    known = {*_Generation.__struct_fields__, *_NOT_SAMPLING, *_LENGTHS}
    if unknown := sorted(raw.keys() - known):
        warnings.append(f"not applied: {', '.join(unknown)}")
    return GenerationDefaults(
        temperature=given.temperature if _does_sample(given, raw, warnings) else 0.0,
        top_p=given.top_p,
        top_k=max(given.top_k, 0),
        min_p=given.min_p,
        repetition_penalty=agreed(
            {"repetition_penalty": given.repetition_penalty, "penalty_score": given.penalty_score}, 1.0
        ),
        presence_penalty=agreed(
            {"presence_penalty": given.presence_penalty, "presence_score": given.presence_score}, 0.0
        ),
        frequency_penalty=agreed(
            {"frequency_penalty": given.frequency_penalty, "frequency_score": given.frequency_score}, 0.0
        ),
    )


def _does_sample(given: _Generation, raw: dict[str, Any], warnings: list[str]) -> bool:
    """Return True to sample tokens, the reference server's default, or False to take the likeliest."""
    strategies = {None: None, "sampling": True, "greedy_search": False}
    if given.decode_strategy not in strategies:
        warnings.append(f"not applied: decode_strategy {given.decode_strategy!r}")
    by_strategy = strategies.get(given.decode_strategy)
    sampled = agreed({"do_sample": given.do_sample, "do_sample by decode_strategy": by_strategy}, True)
    if not sampled and raw.get("temperature"):
        warnings.append(f"do_sample is false, so temperature {raw['temperature']} is not applied: answers are greedy")
    return sampled
