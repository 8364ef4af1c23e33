"""The model's configuration: the hub's flat config.json and transformers' nested one, as one strict struct.

Both forms hold the same facts under mostly the same names; the nested form keeps the decoder's under `text_config`.
Every fact is decoded from wherever either form may put it, and must agree wherever it is given twice. What a file may
leave out, and what it then means, is written where it is resolved; everything else is required.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from shared.errors import CheckpointError

Quantization = Literal["wint8", "wint4"]

HUB_TYPE, NATIVE_TYPE = "ernie4_5_moe_vl", "ernie4_5_vl_moe"

# Fields that say what the forward pass computes. It computes this and nothing else.
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
# The sections of a 128-wide head, where a file names none: transformers' default, and by freq_allocation the hub's.
_PUBLISHED_HEAD_DIM, _PUBLISHED_SECTIONS = 128, (22, 22, 20)
# Names of the one rotary embedding there is. The sections, not the name, say that positions have three axes.
_ROPE_TYPES = ("default", "mrope", "ernie_3d")
_LAST_LAYER = -1


class VisionConfig(msgspec.Struct, frozen=True):
    """The vision tower and the resampler's input."""

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
    """Every number the forward pass, the cache and the prompt need."""

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
    quantization: Quantization | None = None  # asked for by config.json: quantise the stored weights while loading
    warnings: tuple[str, ...] = ()  # what was ignored or taken by default; each names the file and the field


class GenerationDefaults(msgspec.Struct, frozen=True):
    """Sampling defaults: generation_config.json, else the reference server's."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_p: float = 0.0
    warnings: tuple[str, ...] = ()  # what was ignored; each names the file and the field


def load_model_config(directory: Path) -> ModelConfig:
    """Read config.json (either form) and generation_config.json.

    Raises:
        CheckpointError: a field is missing, mistyped or contradicts another; the message names it.
    """
    path = directory / "config.json"
    raw = _read_object(path)
    if raw is None:
        raise CheckpointError(f"{path} does not exist")
    warnings: list[str] = []
    try:
        config = _model_config(raw, _read_object(directory / "generation_config.json") or {}, warnings)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return msgspec.structs.replace(config, warnings=tuple(f"{path}: {text}" for text in warnings))


def load_generation_defaults(directory: Path) -> GenerationDefaults:
    """Read what a request that sends no sampling field gets.

    The reference server falls back to top_p 0.7 only where there is no generation_config.json; a file that leaves a
    field out means "off" by it, and one without `do_sample` still samples.

    Raises:
        CheckpointError: a field of generation_config.json is mistyped or out of range; the message names it.
    """
    path = directory / "generation_config.json"
    raw = _read_object(path)
    if raw is None:
        return GenerationDefaults(1.0, 0.7, 0, 1.0, 0.0, 0.0)
    raw = {key: value for key, value in raw.items() if value is not None}
    warnings: list[str] = []
    try:
        defaults = _generation_defaults(_convert(raw, _Generation, ""), raw, warnings)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return msgspec.structs.replace(defaults, warnings=tuple(f"{path}: {text}" for text in warnings))


def online_quantization(quantization_config: object) -> Quantization | None:
    """Return the quantisation while loading that FastDeploy's online form of quantization_config asks for.

    None for every other form: its weights are quantised already, or the quantisation is one that is not served.
    """
    if not isinstance(quantization_config, dict):
        return None
    try:
        asked = msgspec.convert(quantization_config, _Quantization)
    except msgspec.ValidationError:
        return None
    if asked.is_quantized or asked.is_moe_quantized:
        return None
    if asked.quantization != "mix_quant":
        return asked.quantization
    return asked.moe_quant_type if asked.dense_quant_type == "wint8" else None


# ------------------------------------------------------------------------------------------------ what files may hold

Size = Annotated[int, msgspec.Meta(ge=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Rope(msgspec.Struct):
    """rope_parameters, or rope_scaling, its older name."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    mrope_section: tuple[Size, Size, Size] | None = None  # frequencies of h, w, t
    freq_allocation: Size | None = None
    factor: float | None = None
    partial_rotary_factor: float | None = None


class _Quantization(msgspec.Struct):
    """FastDeploy's quantization_config; a file without is_quantized holds quantised weights."""

    quantization: Literal["wint8", "wint4", "mix_quant"]
    is_quantized: bool
    is_moe_quantized: bool = False
    dense_quant_type: Quantization | None = None
    moe_quant_type: Quantization | None = None


class _Text(msgspec.Struct):
    """The decoder: the hub's root, or transformers' text_config."""

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
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    freq_allocation: Size | None = None
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    moe_layer_start_index: int | list[int] | None = None
    moe_layer_end_index: int | list[int] | None = None
    moe_layer_interval: Size | None = None


class _Shared(msgspec.Struct):
    """What a nested file may keep at its root or in text_config."""

    tie_word_embeddings: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


class _Root(msgspec.Struct):
    """What both forms keep at the root."""

    im_patch_id: TokenId | None = None
    image_token_id: TokenId | None = None
    image_start_token_id: TokenId | None = None
    image_end_token_id: TokenId | None = None
    video_start_token_id: TokenId | None = None
    video_end_token_id: TokenId | None = None
    pixel_hidden_size: Size | None = None
    spatial_conv_size: Size | None = None
    temporal_conv_size: Size | None = None


class _Vision(msgspec.Struct):
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
    rope_parameters: _Rope | None = None


class _Generation(msgspec.Struct):
    """generation_config.json; a field that is left out switches nothing on. The `_score` names are Paddle's."""

    do_sample: bool | None = None
    decode_strategy: str | None = None  # Paddle's do_sample
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = 0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Positive | None = None
    penalty_score: Positive | None = None
    presence_penalty: float | None = None
    presence_score: float | None = None
    frequency_penalty: float | None = None
    frequency_score: float | None = None


# Fields of generation_config.json that draw no token: read elsewhere, or transformers' bookkeeping.
_NOT_SAMPLING = {
    *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache"),
    *("_from_model_config", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
    *("output_hidden_states", "cache_implementation", "cache_config"),
}
_LENGTHS = ("max_new_tokens", "max_length")


# ------------------------------------------------------------------------------------------------- resolving the facts

T = TypeVar("T")


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _convert(raw: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{where}: {error}" if where else str(error)) from error


def _one(given: dict[str, T | None], default: T | None = None) -> T:
    """The value of a fact on which all the places that give it agree, else the default."""
    values = {place: value for place, value in given.items() if value is not None}
    value = next(iter(values.values()), default)
    if value is None:
        raise CheckpointError(f"missing field {' or '.join(given)}")
    if any(other != value for other in values.values()):
        raise CheckpointError(", ".join(f"{place} is {value!r}" for place, value in values.items()) + ": they disagree")
    return value


def _one_or_warn(given: dict[str, T | None], default: T, warnings: list[str]) -> T:
    """Return what `_one` does, with a warning where the default is taken."""
    if all(value is None for value in given.values()):
        warnings.append(f"{' or '.join(given)} is not given; {default!r} is taken")
    return _one(given, default)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise CheckpointError(message)


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
        repetition_penalty=_one(
            {"repetition_penalty": given.repetition_penalty, "penalty_score": given.penalty_score}, 1.0
        ),
        presence_penalty=_one(
            {"presence_penalty": given.presence_penalty, "presence_score": given.presence_score}, 0.0
        ),
        frequency_penalty=_one(
            {"frequency_penalty": given.frequency_penalty, "frequency_score": given.frequency_score}, 0.0
        ),
    )


def _does_sample(given: _Generation, raw: dict[str, Any], warnings: list[str]) -> bool:
    """Decide between drawing tokens, which the reference server does where a file says nothing, and the likeliest."""
    strategies = {None: None, "sampling": True, "greedy_search": False}
    if given.decode_strategy not in strategies:
        warnings.append(f"not applied: decode_strategy {given.decode_strategy!r}")
    by_strategy = strategies.get(given.decode_strategy)
    sampled = _one({"do_sample": given.do_sample, "do_sample by decode_strategy": by_strategy}, True)
    if not sampled and raw.get("temperature"):
        warnings.append(f"do_sample is false, so temperature {raw['temperature']} is not applied: answers are greedy")
    return sampled


def _model_config(raw: dict[str, Any], generation: dict[str, Any], warnings: list[str]) -> ModelConfig:
    model_type = raw.get("model_type")
    _require(model_type in (HUB_TYPE, NATIVE_TYPE), f"model_type is {model_type!r}, not {HUB_TYPE} or {NATIVE_TYPE}")
    nested = model_type == NATIVE_TYPE
    raw_text = _sub_object(raw, "text_config") if nested else raw
    for name, value in _FIXED.items():
        found = raw_text.get(name)
        _require(found is None or found == value, f"{name} is {found!r}; only {value!r} is supported")
    text = _convert(raw_text, _Text, "text_config" if nested else "")
    root = _convert(raw, _Root, "")
    shared = {"": _convert(raw, _Shared, "")}
    if nested:
        shared["text_config."] = _convert(raw_text, _Shared, "text_config")
    defaults = _convert(generation, _Shared, "generation_config.json")

    head_dim = _head_dim(text)
    ropes = _ropes(text)
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
        rope_theta=_rope_theta(text, ropes),
        time_freqs=_time_freqs(text, ropes, head_dim, nested, warnings),
        # transformers' default, and the published model's.
        tie_embeddings=_one({f"{at}tie_word_embeddings": s.tie_word_embeddings for at, s in shared.items()}, True),
        num_experts=_num_experts(text),
        text_expert_size=text.moe_intermediate_size[0],
        vision_expert_size=text.moe_intermediate_size[1],
        experts_per_token=text.moe_k,
        num_shared_experts=text.moe_num_shared_experts,
        shared_expert_size=text.moe_num_shared_experts * text.moe_intermediate_size[0],
        dense_layers=_dense_layers(text, warnings),
        pad_id=_one({f"{at}pad_token_id": s.pad_token_id for at, s in shared.items()}, defaults.pad_token_id),
        bos_id=_one({f"{at}bos_token_id": s.bos_token_id for at, s in shared.items()}, defaults.bos_token_id),
        eos_ids=_eos_ids([*shared.values(), defaults]),
        dtype=_dtype(shared, warnings),
        quantization=_quantization(raw.get("quantization_config"), warnings),
        vision=_vision(_convert(_sub_object(raw, "vision_config"), _Vision, "vision_config"), root),
        image_patch_id=ids["image_patch"],
        image_start_id=ids["image_start"],
        image_end_id=ids["image_end"],
        video_start_id=ids["video_start"],
        video_end_id=ids["video_end"],
    )
    for name, last in ("pad", config.pad_id), ("bos", config.bos_id), ("eos", max(config.eos_ids)):
        _require(last < config.vocab_size, f"{name}_token_id {last} is not in the vocabulary of {config.vocab_size}")
    return config


def _sub_object(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"missing field {name}")
    return value


def _head_dim(text: _Text) -> int:
    heads, hidden = text.num_attention_heads, text.hidden_size
    _require(
        heads % text.num_key_value_heads == 0,
        f"num_attention_heads {heads} is no multiple of num_key_value_heads {text.num_key_value_heads}",
    )
    if text.head_dim is None:
        _require(hidden % heads == 0, f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = text.head_dim or hidden // heads
    _require(head_dim % 2 == 0, f"head_dim {head_dim} is odd, so it has no rotary pairs")
    return head_dim


def _ropes(text: _Text) -> dict[str, _Rope]:
    """Collect what describes the rotary embedding, by the name of the field."""
    given = {"rope_parameters": text.rope_parameters, "rope_scaling": text.rope_scaling}
    ropes = {name: rope for name, rope in given.items() if rope is not None}
    for name, rope in ropes.items():
        for field, kind in ("rope_type", rope.rope_type), ("type", rope.type):
            _require(
                kind is None or kind in _ROPE_TYPES,
                f"{name}.{field} is {kind!r}; only {', '.join(_ROPE_TYPES)} are supported",
            )
        for field, factor in ("factor", rope.factor), ("partial_rotary_factor", rope.partial_rotary_factor):
            _require(factor in (None, 1.0), f"{name}.{field} is {factor}; only 1 is supported")
    return ropes


def _rope_theta(text: _Text, ropes: dict[str, _Rope]) -> float:
    places = {"rope_theta": text.rope_theta, "rope_parameters.rope_theta": None}
    return _one(places | {f"{name}.rope_theta": rope.rope_theta for name, rope in ropes.items()})


def _time_freqs(text: _Text, ropes: dict[str, _Rope], head_dim: int, nested: bool, warnings: list[str]) -> int:
    """How many of the head_dim / 2 frequencies follow time; height and width share the rest evenly."""
    freqs = head_dim // 2
    places = {"freq_allocation": text.freq_allocation}
    for name, rope in ropes.items():
        places[f"{name}.freq_allocation"] = rope.freq_allocation
        if rope.mrope_section is not None:
            places[f"{name}.mrope_section[2]"] = _section_of_time(name, rope.mrope_section, freqs)
    published = head_dim == _PUBLISHED_HEAD_DIM
    if nested and published and not any(rope.mrope_section for rope in ropes.values()):
        places["rope_parameters.mrope_section[2]"] = _PUBLISHED_SECTIONS[2]
    time = _one_or_warn(places, _PUBLISHED_SECTIONS[2], warnings) if published else _one(places)
    _require(
        time < freqs and (freqs - time) % 2 == 0,
        f"freq_allocation {time} of {freqs} frequencies leaves none, or an odd number, for height and width",
    )
    return time


def _section_of_time(name: str, sections: tuple[int, int, int], freqs: int) -> int:
    height, width, time = sections
    where = f"{name}.mrope_section {list(sections)}"
    _require(sum(sections) == freqs, f"{where} does not add up to head_dim / 2, which is {freqs}")
    _require(height == width, f"{where} gives height and width different numbers of frequencies")
    return time


def _num_experts(text: _Text) -> int:
    pair = _pair("moe_num_experts", text.moe_num_experts)
    _require(pair[0] == pair[1], f"moe_num_experts is {list(pair)}: both pools must have as many")
    _require(text.moe_k <= pair[0], f"moe_k {text.moe_k} is more than moe_num_experts {pair[0]}")
    return pair[0]


def _dense_layers(text: _Text, warnings: list[str]) -> tuple[int, ...]:
    types = text.mlp_layer_types
    if types is not None:
        _require(
            len(types) == text.num_hidden_layers,
            f"mlp_layer_types has {len(types)} entries for num_hidden_layers {text.num_hidden_layers}",
        )
    ranged = None if text.moe_layer_start_index is None else _dense_layers_of_range(text, warnings)
    listed = None if types is None else tuple(i for i, kind in enumerate(types) if kind == "dense")
    return _one({"mlp_layer_types": listed, "moe_layer_start_index": ranged})


def _dense_layers_of_range(text: _Text, warnings: list[str]) -> tuple[int, ...]:
    """Layer i is MoE where start <= i <= end and (i + 1) is a multiple of the interval; the same for both pools."""
    starts = _pair("moe_layer_start_index", text.moe_layer_start_index)
    ends = _moe_ends(text, warnings)
    interval = _one_or_warn({"moe_layer_interval": text.moe_layer_interval}, 1, warnings)
    pools = [
        tuple(i for i in range(text.num_hidden_layers) if (i + 1) % interval or not start <= i <= end)
        for start, end in zip(starts, ends, strict=True)
    ]
    _require(
        pools[0] == pools[1],
        f"moe_layer_start_index {list(starts)} and moe_layer_end_index {list(ends)} put the pools in different layers",
    )
    return pools[0]


def _moe_ends(text: _Text, warnings: list[str]) -> tuple[int, int]:
    """Return the last MoE layer of each pool. A file may name one behind the last layer, and -1 for the last."""
    name, last = "moe_layer_end_index", text.num_hidden_layers - 1
    if text.moe_layer_end_index is None:
        warnings.append(f"{name} is not given; the last layer, {last}, is taken")
        return last, last
    ends = _pair(name, text.moe_layer_end_index)
    _require(min(ends) >= _LAST_LAYER, f"{name} is {text.moe_layer_end_index}; it must be at least {_LAST_LAYER}")
    if _LAST_LAYER in ends:
        warnings.append(f"{name} is {text.moe_layer_end_index}; {_LAST_LAYER} is taken for the last layer, {last}")
    text_end, vision_end = (last if end == _LAST_LAYER else end for end in ends)
    return text_end, vision_end


def _pair(name: str, value: int | list[int] | None) -> tuple[int, int]:
    """A fact of the two pools, text and vision: given for each or once for both."""
    if value is None:
        raise CheckpointError(f"missing field {name}")
    if isinstance(value, int):
        return value, value
    _require(len(value) == 2, f"{name} {value} is not a pair: one for text, one for vision")
    return value[0], value[1]


def _media_ids(root: _Root, vocab_size: int) -> dict[str, int]:
    patch = _one({"im_patch_id": root.im_patch_id, "image_token_id": root.image_token_id})
    _require(patch < vocab_size, f"im_patch_id {patch} is not in the vocabulary of {vocab_size}")
    given = {
        "image_start": root.image_start_token_id,
        "image_end": root.image_end_token_id,
        "video_start": root.video_start_token_id,
        "video_end": root.video_end_token_id,
    }
    ids = {"image_patch": patch}
    for name, value in given.items():
        field = f"{name}_token_id"
        marker = _one({field: value}, _PUBLISHED_MARKERS[name] if patch == _PUBLISHED_PATCH_ID else None)
        _require(
            patch < marker < vocab_size,
            f"{field} {marker} is not between im_patch_id {patch} and vocab_size {vocab_size}",
        )
        ids[name] = marker
    _require(len(set(ids.values())) == len(ids), f"two of the media token ids are the same: {ids}")
    return ids


def _eos_ids(places: list[_Shared]) -> tuple[int, ...]:
    """The union of what config.json and generation_config.json say, in that order."""
    ids: dict[int, None] = {}
    for place in places:
        if place.eos_token_id is not None:
            several = place.eos_token_id if isinstance(place.eos_token_id, list) else [place.eos_token_id]
            ids |= dict.fromkeys(several)
    _require(bool(ids), "missing field eos_token_id")
    return tuple(ids)


def _dtype(shared: dict[str, _Shared], warnings: list[str]) -> str:
    places = {f"{at}torch_dtype": s.torch_dtype for at, s in shared.items()}
    places |= {f"{at}dtype": s.dtype for at, s in shared.items()}
    dtype = _one_or_warn(places, _PUBLISHED_DTYPE, warnings)
    known = ("bfloat16", "float16", "float32")
    _require(dtype in known, f"torch_dtype is {dtype!r}, not one of {', '.join(known)}")
    return dtype


def _quantization(value: Any, warnings: list[str]) -> Quantization | None:
    """Read the online form. `shared.checkpoint`, which reads the weights, refuses the other forms."""
    if value == {}:
        warnings.append("quantization_config is empty; the weights are served as they are stored")
    quantization = online_quantization(value)
    if quantization is not None and (cache := value.get("kv_cache_quant_type")) is not None:
        warnings.append(f"quantization_config.kv_cache_quant_type {cache!r} is not applied; the cache is not quantised")
    return quantization


def _vision(vision: _Vision, root: _Root) -> VisionConfig:
    hidden = vision.hidden_size
    _one(
        {
            "vision_config.hidden_size": hidden,
            "vision_config.embed_dim": vision.embed_dim,
            "pixel_hidden_size": root.pixel_hidden_size,
        },
    )
    _require(
        hidden % vision.num_heads == 0 and hidden // vision.num_heads % 4 == 0,
        f"vision_config.hidden_size {hidden} does not give each of vision_config.num_heads {vision.num_heads} heads "
        "a multiple of 4 values",
    )
    rope = vision.rope_parameters or _Rope(rope_theta=10000.0)
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
        rope_theta=_one({"vision_config.rope_parameters.rope_theta": rope.rope_theta}),
    )


def _vision_mlp_size(vision: _Vision) -> int:
    product = None if vision.mlp_ratio is None else vision.mlp_ratio * vision.hidden_size
    size = _one(
        {
            "vision_config.mlp_ratio x hidden_size": product,
            "vision_config.intermediate_size": None
            if vision.intermediate_size is None
            else float(vision.intermediate_size),
        },
    )
    _require(size.is_integer(), f"vision_config.mlp_ratio {vision.mlp_ratio} x hidden_size is {size}, no whole number")
    return int(size)


def _merge(axis: str, of_vision: int | None, of_root: int | None) -> int:
    name = f"vision_config.{axis}_merge_size"
    size = _one({name: of_vision, f"{axis}_conv_size": of_root})
    _require(size == 2, f"{name} is {size}; only 2 is supported")
    return size
