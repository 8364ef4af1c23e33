"""Fields of config.json in both of its forms, as structs, and the rules for reading them."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from shared.errors import CheckpointError

Quantization = Literal["wint8", "wint4"]

Size = Annotated[int, msgspec.Meta(ge=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
# JSON has no infinity, but Python reads and writes it.
LARGEST = sys.float_info.max
Finite = Annotated[float, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=LARGEST)]


class RopeFields(msgspec.Struct):
    """Fields of rope_parameters, or of rope_scaling, its older name."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    mrope_section: tuple[Size, Size, Size] | None = None  # frequencies of h, w, t
    freq_allocation: Size | None = None
    factor: float | None = None
    partial_rotary_factor: float | None = None


class QuantizationFields(msgspec.Struct):
    """Fields of FastDeploy's quantization_config; without is_quantized, the weights are quantised already."""

    quantization: Literal["wint8", "wint4", "mix_quant"]
    is_quantized: bool
    is_moe_quantized: bool = False
    dense_quant_type: Quantization | None = None
    moe_quant_type: Quantization | None = None


class TextFields(msgspec.Struct):
    """Fields of the decoder: at the hub's root, or in transformers' text_config."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    max_position_embeddings: Size
    rms_norm_eps: Positive
    moe_num_experts: Size | list[Size]  # a pair is [text, vision]
    moe_intermediate_size: tuple[Size, Size]
    moe_k: Size
    moe_num_shared_experts: Size
    head_dim: Size | None = None
    rope_theta: Positive | None = None
    rope_parameters: RopeFields | None = None
    rope_scaling: RopeFields | None = None
    freq_allocation: Size | None = None
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    moe_layer_start_index: int | list[int] | None = None
    moe_layer_end_index: int | list[int] | None = None
    moe_layer_interval: Size | None = None


class SharedFields(msgspec.Struct):
    """Fields that a nested file may keep at its root or in text_config."""

    tie_word_embeddings: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


class RootFields(msgspec.Struct):
    """Fields that both forms keep at the root."""

    im_patch_id: TokenId | None = None
    image_token_id: TokenId | None = None
    image_start_token_id: TokenId | None = None
    image_end_token_id: TokenId | None = None
    video_start_token_id: TokenId | None = None
    video_end_token_id: TokenId | None = None
    pixel_hidden_size: Size | None = None
    spatial_conv_size: Size | None = None
    temporal_conv_size: Size | None = None


class VisionFields(msgspec.Struct):
    """Fields of vision_config."""

    depth: Size
    hidden_size: Size
    num_heads: Size
    in_channels: Size
    patch_size: Size
    spatial_merge_size: Size
    embed_dim: Size | None = None
    mlp_ratio: Positive | None = None
    intermediate_size: Size | None = None
    temporal_merge_size: Size | None = None
    hidden_act: Literal["quick_gelu"] = "quick_gelu"
    rms_norm_eps: Positive = 1e-6
    rope_parameters: RopeFields | None = None


# ------------------------------------------------------------------------------------------------------------ reading

T = TypeVar("T")


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in `path`; None if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def convert(raw: Any, kind: type[T], where: str) -> T:
    """Decode `raw` as `kind`; an error names `where`, if that is not empty, and the field."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{where}: {error}" if where else str(error)) from error


def agreed(given: dict[str, T | None], default: T | None = None) -> T:
    """Return the value on which all places that give a fact agree, or the default if none gives it.

    Raises:
        CheckpointError: they disagree, or there is neither a value nor a default.
    """
    values = {place: value for place, value in given.items() if value is not None}
    value = next(iter(values.values()), default)
    if value is None:
        raise CheckpointError(f"missing field {' or '.join(given)}")
    if any(other != value for other in values.values()):
        raise CheckpointError(", ".join(f"{place} is {value!r}" for place, value in values.items()) + ": they disagree")
    return value


def agreed_or_warn(given: dict[str, T | None], default: T, warnings: list[str]) -> T:
    """Return the result of `agreed`; append a warning if it is the default."""
    if all(value is None for value in given.values()):
        warnings.append(f"{' or '.join(given)} is not given; {default!r} is taken")
    return agreed(given, default)


def require(holds: bool, message: str) -> None:
    """Raise a CheckpointError with `message` unless `holds`."""
    if not holds:
        raise CheckpointError(message)
