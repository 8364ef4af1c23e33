"""config.json in both forms: the same facts come out, and whatever is missing or contradictory is named."""

import json
from pathlib import Path
from typing import Any

import msgspec
import oracle
import pytest

from cli.demo import hub_config
from shared.errors import CheckpointError
from shared.model_config import (
    GenerationDefaults,
    ModelConfig,
    VisionConfig,
    load_generation_defaults,
    load_model_config,
)

# The published checkpoint's config.json, as far as it is known.
PUBLISHED: dict[str, Any] = {
    "model_type": "ernie4_5_moe_vl",
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "use_bias": False,
    "rope_theta": 500000,
    "rope_3d": True,
    "freq_allocation": 20,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "moe_capacity": [128, 128, 128],
    "im_patch_id": 100295,
    "pixel_hidden_size": 1280,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "rope_scaling": None,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1280,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
    },
}
VISION = VisionConfig(32, 1280, 16, 5120, 14, 3, 2, 2, 1e-6, 10000.0)
MODEL = ModelConfig(
    vocab_size=103424,
    hidden_size=2560,
    intermediate_size=12288,
    num_layers=28,
    num_heads=20,
    num_kv_heads=4,
    head_dim=128,
    max_position_embeddings=131072,
    norm_eps=1e-5,
    rope_theta=500000.0,
    time_freqs=20,
    tie_embeddings=True,
    num_experts=64,
    text_expert_size=1536,
    vision_expert_size=512,
    experts_per_token=6,
    num_shared_experts=2,
    shared_expert_size=3072,
    dense_layers=(0,),
    image_patch_id=100295,
    image_start_id=101304,
    image_end_id=101305,
    video_start_id=101306,
    video_end_id=101307,
    pad_id=0,
    bos_id=1,
    eos_ids=(2,),
    dtype="bfloat16",
    vision=VISION,
)
MARKERS = {
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
}
ABSENT = object()


def nested() -> dict[str, Any]:
    """What transformers writes for the same model."""
    config = oracle.hf_config({**PUBLISHED, **MARKERS, "tie_word_embeddings": True})
    return {**json.loads(config.to_json_string()), "dtype": "bfloat16"}


def write(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one field set, or removed by ABSENT; dots go down."""
    config = json.loads(json.dumps(config))
    *parents, leaf = path.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    if value is ABSENT:
        del place[leaf]
    else:
        place[leaf] = value
    return config


def test_the_published_model(tmp_path: Path) -> None:
    assert load_model_config(write(tmp_path, PUBLISHED)) == MODEL


def test_a_dtype_taken_by_default_is_worth_a_warning(tmp_path: Path) -> None:
    loaded = load_model_config(write(tmp_path, changed(PUBLISHED, "torch_dtype", ABSENT)))
    assert loaded.dtype == "bfloat16"
    assert loaded.warnings == (f"{tmp_path}/config.json: torch_dtype or dtype is not given; 'bfloat16' is taken",)


def test_transformers_form_says_the_same(tmp_path: Path) -> None:
    assert load_model_config(write(tmp_path, nested())) == MODEL


def test_transformers_default_sections_are_the_published_ones(tmp_path: Path) -> None:
    config = changed(nested(), "text_config.rope_parameters.mrope_section", ABSENT)
    assert load_model_config(write(tmp_path, config)) == MODEL


def test_the_demos_hub_form_and_what_transformers_saves_agree(tmp_path: Path) -> None:
    oracle.save_with_transformers(tmp_path / "native")
    saved = load_model_config(tmp_path / "native")
    assert saved == load_model_config(write(tmp_path, hub_config("float32")))
    assert (saved.num_heads, saved.head_dim, saved.time_freqs) == (4, 32, 4)


@pytest.mark.parametrize("form", [PUBLISHED, nested()], ids=["hub", "nested"])
def test_every_required_field_is_missed(tmp_path: Path, form: dict[str, Any]) -> None:
    """Remove each field in turn: either it may be absent, and nothing changes, or the error names it."""
    optional = {
        # transformers' own bookkeeping, and training's.
        *("transformers_version", "architectures", "video_token_id", "initializer_range", "router_aux_loss_coef"),
        *("output_router_logits", "use_cache", "moe_capacity"),
        # Documented defaults, facts the forward pass fixes, and facts given twice.
        *("hidden_act", "use_bias", "rope_3d", "rope_scaling", "moe_norm_min", "tie_word_embeddings"),
        *("pixel_hidden_size", "embed_dim", "spatial_conv_size", *MARKERS),
    }
    defaulted = {"torch_dtype", "dtype"}  # with a warning
    paths = [path for path, value in flat(form)]
    for path in paths:
        leaf = path.rpartition(".")[2]
        of_vision = path.startswith("vision_config.") and leaf in ("rms_norm_eps", "model_type", "rope_parameters")
        repeated = path.endswith(("rope_type", "mrope_section")) or path == "text_config.model_type"
        write(tmp_path, changed(form, path, ABSENT))
        if leaf in defaulted:
            loaded = load_model_config(tmp_path)
            assert msgspec.structs.replace(loaded, warnings=()) == MODEL, path
            assert len(loaded.warnings) == 1, path
            assert leaf in loaded.warnings[0]
        elif leaf in optional or of_vision or repeated:
            assert load_model_config(tmp_path) == MODEL, path
        else:
            with pytest.raises(CheckpointError, match=leaf):
                load_model_config(tmp_path)
    assert len(paths) > 30


def flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in config.items():
        found.append((f"{prefix}{key}", value))
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{key}.")
    return found


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model_type", "llama", "model_type"),
        ("hidden_size", "2560", "hidden_size"),
        ("hidden_size", 2561, "hidden_size 2561 is no multiple of num_attention_heads 20"),
        ("hidden_size", 0, "hidden_size"),
        ("hidden_size", True, "hidden_size"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("num_key_value_heads", None, "num_key_value_heads"),
        ("head_dim", 127, "head_dim"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6}, "rope_theta is 500000.0, rope_par.*disagree"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_type"),
        ("rope_parameters", {"mrope_section": [23, 23, 18]}, r"freq_allocation is 20, .*mrope_section\[2\] is 18"),
        ("rope_parameters", {"mrope_section": [22, 20, 22]}, "mrope_section"),
        ("rope_parameters", {"mrope_section": [20, 20, 20]}, "mrope_section"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling"),
        ("freq_allocation", 21, "freq_allocation"),
        ("freq_allocation", 64, "freq_allocation"),
        ("freq_allocation", 0, "freq_allocation"),
        ("rms_norm_eps", 0, "rms_norm_eps"),
        ("hidden_act", "gelu", "hidden_act"),
        ("use_bias", True, "use_bias"),
        ("rope_3d", False, "rope_3d"),
        ("moe_use_aux_free", False, "moe_use_aux_free"),
        ("moe_gate_act", "sigmoid", "moe_gate_act"),
        ("moe_norm_gate_logits", False, "moe_norm_gate_logits"),
        ("use_temporal_conv", False, "use_temporal_conv"),
        ("moe_num_experts", [64, 32], "moe_num_experts"),
        ("moe_num_experts", [64, 64, 64], "moe_num_experts"),
        ("moe_num_experts", [64, 0], "moe_num_experts"),
        ("moe_k", 65, "moe_k"),
        ("moe_num_shared_experts", 0, "moe_num_shared_experts"),
        ("moe_intermediate_size", 1536, "moe_intermediate_size"),
        ("moe_intermediate_size", [1536], "moe_intermediate_size"),
        ("moe_layer_start_index", [1, 2], "moe_layer_start_index"),
        ("moe_layer_end_index", [29, 26], "moe_layer_end_index"),
        ("moe_layer_interval", 0, "moe_layer_interval"),
        ("mlp_layer_types", ["dense"] * 28, "mlp_layer_types"),
        ("mlp_layer_types", ["dense"] * 27, "mlp_layer_types"),
        ("mlp_layer_types", ["sparse"] * 27 + ["other"], "mlp_layer_types"),
        ("im_patch_id", 103424, "im_patch_id"),
        ("im_patch_id", 100294, "image_start_token_id"),  # not the published vocabulary: markers must be given
        ("image_token_id", 100296, "im_patch_id is 100295, image_token_id is 100296"),
        ("image_start_token_id", 5, "image_start_token_id"),
        ("video_end_token_id", 103424, "video_end_token_id"),
        ("video_end_token_id", 101306, "media token ids"),
        ("eos_token_id", [], "eos_token_id"),
        ("eos_token_id", [2, -1], "eos_token_id"),
        ("eos_token_id", [2, 103424], "eos_token_id"),
        ("pad_token_id", 103424, "pad_token_id"),
        ("bos_token_id", "<s>", "bos_token_id"),
        ("torch_dtype", "int8", "torch_dtype"),
        ("dtype", "float32", "torch_dtype is 'bfloat16', dtype is 'float32'"),
        ("pixel_hidden_size", 1281, "pixel_hidden_size"),
        ("spatial_conv_size", 4, "spatial_conv_size"),
        ("temporal_conv_size", 1, "temporal_merge_size is 1"),
        ("vision_config", [], "vision_config"),
        ("vision_config.embed_dim", 1024, "embed_dim"),
        ("vision_config.num_heads", 17, "num_heads"),
        ("vision_config.depth", 1.5, "depth"),
        ("vision_config.hidden_act", "gelu", "hidden_act"),
        ("vision_config.mlp_ratio", 4.0001, "mlp_ratio"),
        ("vision_config.intermediate_size", 4096, "intermediate_size"),
        ("vision_config.temporal_merge_size", 1, "temporal_merge_size"),
    ],
)
def test_a_contradiction_names_its_field(tmp_path: Path, path: str, value: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_model_config(write(tmp_path, changed(PUBLISHED, path, value)))


def test_nested_contradictions_name_both_places(tmp_path: Path) -> None:
    config = changed(nested(), "text_config.tie_word_embeddings", False)
    with pytest.raises(
        CheckpointError, match=r"tie_word_embeddings is True, text_config\.tie_word_embeddings is False"
    ):
        load_model_config(write(tmp_path, config))
    with pytest.raises(CheckpointError, match=r"text_config.*hidden_size"):
        load_model_config(write(tmp_path, changed(nested(), "text_config.hidden_size", ABSENT)))


def test_an_interval_leaves_layers_dense(tmp_path: Path) -> None:
    config = changed(changed(PUBLISHED, "num_hidden_layers", 7), "moe_layer_interval", 2)
    config["moe_layer_start_index"], config["moe_layer_end_index"] = 3, 5
    assert load_model_config(write(tmp_path, config)).dense_layers == (0, 1, 2, 4, 6)


def test_an_untied_head_and_a_given_head_dim(tmp_path: Path) -> None:
    config = changed(changed(PUBLISHED, "tie_word_embeddings", False), "head_dim", 64)
    config["freq_allocation"] = 10
    loaded = load_model_config(write(tmp_path, config))
    assert (loaded.tie_embeddings, loaded.head_dim, loaded.time_freqs) == (False, 64, 10)


def test_end_tokens_are_the_union_in_order(tmp_path: Path) -> None:
    config = changed(PUBLISHED, "eos_token_id", [2, 7])
    assert load_model_config(write(tmp_path, config, {"eos_token_id": [7, 100272, 2]})).eos_ids == (2, 7, 100272)
    config = changed(PUBLISHED, "eos_token_id", None)
    assert load_model_config(write(tmp_path, config, {"eos_token_id": 5})).eos_ids == (5,)


def test_the_generation_config_may_name_what_config_json_does_not(tmp_path: Path) -> None:
    config = changed(changed(nested(), "text_config.pad_token_id", None), "text_config.bos_token_id", None)
    assert load_model_config(write(tmp_path, config, {"pad_token_id": 0, "bos_token_id": 1})) == MODEL


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff"])
def test_no_json_object(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model_config(tmp_path)


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
    ],
)
def test_generation_defaults(tmp_path: Path, generation: dict[str, Any] | None, expected: GenerationDefaults) -> None:
    if generation is not None:
        write(tmp_path, {}, generation)
    assert load_generation_defaults(tmp_path) == expected


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty"])
def test_mistyped_generation_defaults_are_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{field}"):
        load_generation_defaults(write(tmp_path, {}, {field: "high"}))


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1), ("top_p", 1.5), ("top_k", -2), ("repetition_penalty", 0)]
)
def test_generation_defaults_out_of_range_are_named(tmp_path: Path, field: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=field):
        load_generation_defaults(write(tmp_path, {}, {field: value}))
