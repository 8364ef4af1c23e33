"""Configuration of the model: the hub's flat config.json or transformers' nested one, as one strict struct.

Both forms hold the same facts under mostly the same names; the nested form keeps the decoder's under `text_config`.
Every fact is read from all places where either form may put it, and they must agree. The default of a fact that a file
may omit stands where the fact is resolved; all others are required. The files' fields are in config_file.py; the rotary
embedding and the experts, which have several spellings, in rope.py and experts.py.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from shared.errors import CheckpointError, ConfigError
from shared.model.config_file import (
    Quantization,
    QuantizationFields,
    RootFields,
    RopeFields,
    SharedFields,
    TextFields,
    VisionFields,
    agreed,
    agreed_or_warn,
    convert,
    read_object,
    require,
)
from shared.model.experts import dense_layers, num_experts
from shared.model.rope import rope_fields, rope_theta, time_freqs
from shared.model.stored_quantization import stored_format

HUB_TYPE, NATIVE_TYPE = "ernie4_5_moe_vl", "ernie4_5_vl_moe"

# Fields that describe the computation of the forward pass. No other value is implemented.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_rmsnorm": True,
    "rope_3d": True,
    "compression_ratio": 1.0,
    "moe_gate_act": "softmax",
    "moe_norm_gate_logits": True,
    "moe_norm_min": 1e-12,
    "moe_use_aux_free": True,
    "moe_use_hard_gate": True,
    "norm_topk_prob": True,
    "use_temporal_conv": True,
}

# The published vocabulary. A hub file may leave out the marker ids; with any other vocabulary they must be given.
_PUBLISHED_PATCH_ID = 100295
_PUBLISHED_MARKERS = {"image_start": 101304, "image_end": 101305, "video_start": 101306, "video_end": 101307}
_PUBLISHED_DTYPE = "bfloat16"


class VisionConfig(msgspec.Struct, frozen=True):
    """Sizes of the vision tower and of the resampler's input."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    in_channels: int
    spatial_merge_size: int  # 2: a token is a 2 x 2 block of patches
    temporal_merge_size: int  # 2: a video token covers two frames
    norm_eps: float  # LayerNorm, 1e-6
    rope_theta: float  # 10000


class ModelConfig(msgspec.Struct, frozen=True):
    """Facts that the forward pass, the cache and the prompt need."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # dense MLP
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    time_freqs: int  # freq_allocation: the lowest rotary frequencies, which follow time
    tie_embeddings: bool
    num_experts: int  # in each pool
    text_expert_size: int
    vision_expert_size: int
    experts_per_token: int
    num_shared_experts: int
    shared_expert_size: int  # fused width: num_shared_experts x text_expert_size
    dense_layers: tuple[int, ...]  # layers with a dense MLP; all others are MoE
    image_patch_id: int  # placeholder of both images and videos; ids from here on are routed to the vision experts
    image_start_id: int
    image_end_id: int
    video_start_id: int
    video_end_id: int
    pad_id: int
    bos_id: int
    eos_ids: tuple[int, ...]  # generation stops on any of these: config's and generation_config's, de-duplicated
    dtype: str  # "bfloat16", "float32", "float16"
    vision: VisionConfig
    quantization: Quantization | None = None  # requested by config.json: quantise the stored weights while loading
    stored: str | None = None  # how the stored weights are quantised already (`stored_format`)
    warnings: tuple[str, ...] = ()  # fields ignored or set by default; each names the file and the field


def load_model_config(directory: Path) -> ModelConfig:
    """Read config.json (either form) and generation_config.json.

    Raises:
        CheckpointError: a field is missing, mistyped or contradicts another; the message names it.
    """
    path = directory / "config.json"
    raw = read_object(path)
    if raw is None:
        raise CheckpointError(f"{path} does not exist")
    generation = read_object(directory / "generation_config.json") or {}
    warnings: list[str] = []
    try:
        config = _model_config(raw, generation, warnings)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return msgspec.structs.replace(config, warnings=tuple(f"{path}: {text}" for text in warnings))


def chosen_quantization(config: ModelConfig, asked: Literal["none"] | Quantization | None) -> Quantization | None:
    """Return how weights are quantised as they load: as is asked, else as config.json asks; None: not at all.

    Raises:
        ConfigError: the weights are quantised already, in another form than is asked.
    """
    if config.stored is None:
        return config.quantization if asked is None else None if asked == "none" else asked
    if asked not in (None, "none", config.stored):
        raise ConfigError(
            f"quantization is {asked}, but the model's weights are quantised already ({config.stored}) and are served "
            "as they are; leave it out"
        )
    return None


def online_quantization(quantization_config: object) -> Quantization | None:
    """Return the quantisation while loading that FastDeploy's online form of quantization_config requests.

    None for every other form: its weights are quantised already, or its quantisation is not supported.
    """
    if not isinstance(quantization_config, dict):
        return None
    try:
        asked = msgspec.convert(quantization_config, QuantizationFields)
    except msgspec.ValidationError:
        return None
    if asked.is_quantized or asked.is_moe_quantized:
        return None
    if asked.quantization != "mix_quant":
        return asked.quantization
    return asked.moe_quant_type if asked.dense_quant_type == "wint8" else None


# ------------------------------------------------------------------------------------------------- resolving the facts


def _model_config(raw: dict[str, Any], generation: dict[str, Any], warnings: list[str]) -> ModelConfig:
    model_type = raw.get("model_type")
    require(model_type in (HUB_TYPE, NATIVE_TYPE), f"model_type is {model_type!r}, not {HUB_TYPE} or {NATIVE_TYPE}")
    nested = model_type == NATIVE_TYPE
    raw_text = _sub_object(raw, "text_config") if nested else raw
    for name, value in _FIXED.items():
        found = raw_text.get(name)
        require(found is None or found == value, f"{name} is {found!r}; only {value!r} is supported")
    text = convert(raw_text, TextFields, "text_config" if nested else "")
    root = convert(raw, RootFields, "")
    shared = {"": convert(raw, SharedFields, "")}
    if nested:
        shared["text_config."] = convert(raw_text, SharedFields, "text_config")
    defaults = convert(generation, SharedFields, "generation_config.json")

    head_dim = _head_dim(text)
    ropes = rope_fields(text)
    ids = _media_ids(root, text.vocab_size)
    config = ModelConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=text.max_position_embeddings,
        norm_eps=text.rms_norm_eps,
        rope_theta=rope_theta(text, ropes),
        time_freqs=time_freqs(text, ropes, head_dim, nested, warnings),
        # transformers' default, and the published model's.
        tie_embeddings=agreed({f"{at}tie_word_embeddings": s.tie_word_embeddings for at, s in shared.items()}, True),
        num_experts=num_experts(text),
        text_expert_size=text.moe_intermediate_size[0],
        vision_expert_size=text.moe_intermediate_size[1],
        experts_per_token=text.moe_k,
        num_shared_experts=text.moe_num_shared_experts,
        shared_expert_size=text.moe_num_shared_experts * text.moe_intermediate_size[0],
        dense_layers=dense_layers(text, warnings),
        pad_id=agreed({f"{at}pad_token_id": s.pad_token_id for at, s in shared.items()}, defaults.pad_token_id),
        bos_id=agreed({f"{at}bos_token_id": s.bos_token_id for at, s in shared.items()}, defaults.bos_token_id),
        eos_ids=_eos_ids([*shared.values(), defaults]),
        dtype=_dtype(shared, warnings),
        quantization=_quantization(raw.get("quantization_config"), warnings),
        stored=_stored(raw.get("quantization_config"), warnings),
        vision=_vision(convert(_sub_object(raw, "vision_config"), VisionFields, "vision_config"), root),
        image_patch_id=ids["image_patch"],
        image_start_id=ids["image_start"],
        image_end_id=ids["image_end"],
        video_start_id=ids["video_start"],
        video_end_id=ids["video_end"],
    )
    for name, last in ("pad", config.pad_id), ("bos", config.bos_id), ("eos", max(config.eos_ids)):
        require(last < config.vocab_size, f"{name}_token_id {last} is not in the vocabulary of {config.vocab_size}")
    return config


def _sub_object(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"missing field {name}")
    return value


def _head_dim(text: TextFields) -> int:
    heads, hidden = text.num_attention_heads, text.hidden_size
    require(
        heads % text.num_key_value_heads == 0,
        f"num_attention_heads {heads} is no multiple of num_key_value_heads {text.num_key_value_heads}",
    )
    if text.head_dim is None:
        require(hidden % heads == 0, f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = text.head_dim or hidden // heads
    require(head_dim % 2 == 0, f"head_dim {head_dim} is odd, so it has no rotary pairs")
    return head_dim


def _media_ids(root: RootFields, vocab_size: int) -> dict[str, int]:
    patch = agreed({"im_patch_id": root.im_patch_id, "image_token_id": root.image_token_id})
    require(patch < vocab_size, f"im_patch_id {patch} is not in the vocabulary of {vocab_size}")
    given = {
        "image_start": root.image_start_token_id,
        "image_end": root.image_end_token_id,
        "video_start": root.video_start_token_id,
        "video_end": root.video_end_token_id,
    }
    ids = {"image_patch": patch}
    for name, value in given.items():
        field = f"{name}_token_id"
        marker = agreed({field: value}, _PUBLISHED_MARKERS[name] if patch == _PUBLISHED_PATCH_ID else None)
        require(
            patch < marker < vocab_size,
            f"{field} {marker} is not between im_patch_id {patch} and vocab_size {vocab_size}",
        )
        ids[name] = marker
    require(len(set(ids.values())) == len(ids), f"two of the media token ids are the same: {ids}")
    return ids


def _eos_ids(places: list[SharedFields]) -> tuple[int, ...]:
    """Return the union of the end tokens in config.json and generation_config.json, in that order."""
    ids: dict[int, None] = {}
    for place in places:
        if place.eos_token_id is not None:
            several = place.eos_token_id if isinstance(place.eos_token_id, list) else [place.eos_token_id]
            ids |= dict.fromkeys(several)
    require(bool(ids), "missing field eos_token_id")
    return tuple(ids)


def _dtype(shared: dict[str, SharedFields], warnings: list[str]) -> str:
    places = {f"{at}torch_dtype": s.torch_dtype for at, s in shared.items()}
    places |= {f"{at}dtype": s.dtype for at, s in shared.items()}
    dtype = agreed_or_warn(places, _PUBLISHED_DTYPE, warnings)
    known = ("bfloat16", "float16", "float32")
    require(dtype in known, f"torch_dtype is {dtype!r}, not one of {', '.join(known)}")
    return dtype


def _quantization(value: Any, warnings: list[str]) -> Quantization | None:
    """Read the online form. `shared.model.checkpoint`, which reads the weights, refuses the other forms."""
    if value == {}:
        warnings.append("quantization_config is empty; the weights are served as they are stored")
    quantization = online_quantization(value)
    if quantization is not None and (cache := value.get("kv_cache_quant_type")) is not None:
        warnings.append(f"quantization_config.kv_cache_quant_type {cache!r} is not applied; the cache is not quantised")
    return quantization


def _stored(value: Any, warnings: list[str]) -> str | None:
    """Name the form of weights that are quantised already. What cannot be read is refused with the weights."""
    stored = stored_format(value)
    if stored is not None and value.get("kv_cache_scheme") is not None:
        warnings.append("quantization_config.kv_cache_scheme is not applied; the cache is not quantised")
    return stored


def _vision(vision: VisionFields, root: RootFields) -> VisionConfig:
    hidden = vision.hidden_size
    agreed(
        {
            "vision_config.hidden_size": hidden,
            "vision_config.embed_dim": vision.embed_dim,
            "pixel_hidden_size": root.pixel_hidden_size,
        },
    )
    require(
        hidden % vision.num_heads == 0 and hidden // vision.num_heads % 4 == 0,
        f"vision_config.hidden_size {hidden} does not give each of vision_config.num_heads {vision.num_heads} heads "
        "a multiple of 4 values",
    )
    rope = vision.rope_parameters or RopeFields(rope_theta=10000.0)
    return VisionConfig(
        depth=vision.depth,
        hidden_size=hidden,
        num_heads=vision.num_heads,
        intermediate_size=_vision_mlp_size(vision),
        patch_size=vision.patch_size,
        in_channels=vision.in_channels,
        spatial_merge_size=_merge("spatial", vision.spatial_merge_size, root.spatial_conv_size),
        temporal_merge_size=_merge("temporal", vision.temporal_merge_size, root.temporal_conv_size),
        norm_eps=vision.rms_norm_eps,
        rope_theta=agreed({"vision_config.rope_parameters.rope_theta": rope.rope_theta}),
    )


def _vision_mlp_size(vision: VisionFields) -> int:
    product = None if vision.mlp_ratio is None else vision.mlp_ratio * vision.hidden_size
    size = agreed(
        {
            "vision_config.mlp_ratio x hidden_size": product,
            "vision_config.intermediate_size": None
            if vision.intermediate_size is None
            else float(vision.intermediate_size),
        },
    )
    require(size.is_integer(), f"vision_config.mlp_ratio {vision.mlp_ratio} x hidden_size is {size}, no whole number")
    return int(size)


def _merge(axis: str, of_vision: int | None, of_root: int | None) -> int:
    name = f"vision_config.{axis}_merge_size"
    size = agreed({name: of_vision, f"{axis}_conv_size": of_root})
    require(size == 2, f"{name} is {size}; only 2 is supported")
    return size
