"""config.json in both forms: the same facts come out, and whatever is missing or contradictory is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_files
import msgspec
import oracle
import pytest
from transformers import Ernie4_5_VLMoeConfig

from cli.demo import hub_config
from shared.errors import CheckpointError
from shared.model.config import ModelConfig, VisionConfig, load_model_config

PUBLISHED = hub_files.thinking()
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
MARKERS = ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id")
ABSENT = object()
Form = Callable[..., dict[str, Any]]


def nested() -> dict[str, Any]:
    return hub_files.nested(PUBLISHED)


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


@pytest.mark.parametrize("reader", hub_files.READERS)
def test_the_hubs_files_have_every_key_that_a_reader_reads(reader: str) -> None:
    read = set(hub_files.READERS[reader])
    assert read <= hub_files.keys(hub_files.thinking())
    assert read <= hub_files.keys(hub_files.base())


def test_the_demo_has_the_hubs_keys() -> None:
    """All but the key that names code of the repository."""
    assert hub_files.keys(hub_config("bfloat16")) == hub_files.keys(PUBLISHED) - {"auto_map"}


@pytest.mark.parametrize("variant", [hub_files.thinking, hub_files.base])
@pytest.mark.parametrize("form", [dict, hub_files.nested], ids=["flat", "nested"])
def test_the_published_model(tmp_path: Path, variant: Form, form: Form) -> None:
    assert load_model_config(write(tmp_path, form(variant()))) == MODEL


ROPES: list[dict[str, Any] | None] = [
    None,
    {},
    {"type": "default", "mrope_section": [22, 22, 20]},
    {"rope_type": "default", "type": "mrope", "mrope_section": [22, 22, 20], "rope_theta": 500000},
    {"rope_type": "ernie_3d", "freq_allocation": 20},
    {"type": "mrope", "mrope_section": [22, 22, 20], "freq_allocation": 20, "factor": 1.0},
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("freq_allocation", [20, ABSENT])
def test_every_spelling_of_the_rotary_sections(
    tmp_path: Path, rope: dict[str, Any] | None, freq_allocation: object
) -> None:
    """Flat beside freq_allocation or without it, and nested beside rope_parameters."""
    config = changed(changed(PUBLISHED, "rope_scaling", rope), "freq_allocation", freq_allocation)
    loaded = load_model_config(write(tmp_path, config))
    guessed = freq_allocation is ABSENT and not rope
    named = [f"{tmp_path}/config.json: freq_allocation"] if guessed else []
    assert [text[: len(f"{tmp_path}/config.json: freq_allocation")] for text in loaded.warnings] == named
    assert msgspec.structs.replace(loaded, warnings=()) == MODEL
    assert load_model_config(write(tmp_path, changed(nested(), "text_config.rope_scaling", rope))) == MODEL


def test_the_sections_are_transformers_sections(tmp_path: Path) -> None:
    """transformers reads rope_scaling of a nested file too, and takes the numbers that we take."""
    config = changed(nested(), "text_config.rope_parameters", ABSENT)
    config["text_config"]["rope_scaling"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [20, 20, 24]}
    judged = Ernie4_5_VLMoeConfig.from_dict(config).text_config.rope_parameters
    loaded = load_model_config(write(tmp_path, config))
    assert judged["mrope_section"] == [20, 20, loaded.time_freqs]
    assert judged["rope_theta"] == loaded.rope_theta


# A field, what a file says instead, what then is served, and the one line about it.
LEGAL = [
    ("moe_layer_end_index", -1, {}, "moe_layer_end_index is -1; -1 is taken for the last layer, 27"),
    ("moe_layer_end_index", [29, -1], {}, "moe_layer_end_index is [29, -1]; -1 is taken for the last layer, 27"),
    ("moe_layer_end_index", ABSENT, {}, "moe_layer_end_index is not given; the last layer, 27, is taken"),
    ("moe_layer_interval", ABSENT, {}, "moe_layer_interval is not given; 1 is taken"),
    ("torch_dtype", ABSENT, {}, "torch_dtype or dtype is not given; 'bfloat16' is taken"),
    ("quantization_config", {}, {}, "quantization_config is empty; the weights are served as they are stored"),
    (
        "quantization_config",
        {"quantization": "wint4", "is_quantized": False, "kv_cache_quant_type": "block_wise_fp8"},
        {"quantization": "wint4"},
        "quantization_config.kv_cache_quant_type 'block_wise_fp8' is not applied; the cache is not quantised",
    ),
]


@pytest.mark.parametrize(("field", "value", "served", "line"), LEGAL)
def test_what_is_legal_loads_with_one_line(
    tmp_path: Path, field: str, value: Any, served: dict[str, Any], line: str
) -> None:
    loaded = load_model_config(write(tmp_path, changed(PUBLISHED, field, value)))
    assert loaded == msgspec.structs.replace(MODEL, warnings=(f"{tmp_path}/config.json: {line}",), **served)


@pytest.mark.parametrize(
    ("form", "asked"),
    [
        ({"quantization": "wint4", "is_quantized": False}, "wint4"),
        ({"quantization": "wint8", "is_quantized": False, "is_moe_quantized": False}, "wint8"),
        (
            {
                "quantization": "mix_quant",
                "dense_quant_type": "wint8",
                "moe_quant_type": "wint4",
                "is_quantized": False,
            },
            "wint4",
        ),
        (None, None),
        ({"quantization": "wint4"}, None),
        ({"quantization": "wint4", "is_quantized": True}, None),
        ({"quantization": "wint4", "is_quantized": False, "is_moe_quantized": True}, None),
        ({"quantization": "w4afp8", "is_quantized": False}, None),
        (
            {
                "quantization": "mix_quant",
                "dense_quant_type": "wint4",
                "moe_quant_type": "wint4",
                "is_quantized": False,
            },
            None,
        ),
        ([], None),
    ],
)
def test_fastdeploys_online_quantisation(tmp_path: Path, form: Any, asked: str | None) -> None:
    """What is not that form is None: the reader of the weights says what it is and refuses it."""
    loaded = load_model_config(write(tmp_path, changed(PUBLISHED, "quantization_config", form)))
    assert loaded == msgspec.structs.replace(MODEL, quantization=asked)


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
        *("output_router_logits", "use_cache", "moe_capacity", "auto_map", "moe_gate", "moe_group", "max_text_id"),
        *("moe_multimodal_dispatch_use_allgather", "moe_use_token_type_bias", "moe_dense_experts_token_type_id"),
        *("modality_detach", "mm_vocab_size", "attn_implementation", "attn_sep", "in_chans", "spatial_patch_size"),
        *("vit_first_fwd_bsz", "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"),
        # Documented defaults, facts the forward pass fixes, and facts given twice.
        *("hidden_act", "use_bias", "rope_3d", "rope_scaling", "moe_norm_min", "tie_word_embeddings"),
        *("use_rmsnorm", "compression_ratio", "moe_use_aux_free", "moe_use_hard_gate", "moe_gate_act"),
        *("moe_norm_gate_logits", "use_temporal_conv", "freq_allocation"),
        *("pixel_hidden_size", "embed_dim", "spatial_conv_size", *MARKERS),
    }
    defaulted = {"torch_dtype", "dtype", "moe_layer_end_index", "moe_layer_interval"}  # with a warning
    paths = [path for path, value in flat(form)]
    for path in paths:
        leaf = path.rpartition(".")[2]
        of_vision = path.startswith("vision_config.") and leaf in (
            *("rms_norm_eps", "model_type", "rope_parameters", "dtype"),
        )
        repeated = path.endswith(("rope_type", ".type", "mrope_section")) or path == "text_config.model_type"
        write(tmp_path, changed(form, path, ABSENT))
        if leaf in defaulted and not of_vision:
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
        ("rope_parameters", {"freq_allocation": 18}, "freq_allocation is 20, rope_par.*freq_allocation is 18"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling.type is 'linear'"),
        ("rope_scaling", {"rope_type": "yarn", "type": "default"}, "rope_scaling.rope_type is 'yarn'"),
        ("rope_scaling", {"type": "default", "factor": 2}, "rope_scaling.factor is 2"),
        ("rope_scaling", {"partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor is 0.5"),
        ("rope_scaling", {"rope_theta": 1e4}, "rope_theta is 500000.0, rope_scaling.rope_theta is 10000.0: they dis"),
        ("rope_scaling", {"mrope_section": [20, 20, 24]}, r"tion is 20, rope_scaling.mrope_section\[2\] is 24: they"),
        ("rope_scaling", {"mrope_section": [22, 22, 22]}, "rope_scaling.mrope_section"),
        ("rope_scaling", {"rope_type": "ernie_3d", "freq_allocation": 22}, "rope_scaling.freq_allocation is 22"),
        ("rope_scaling", "default", "rope_scaling"),
        ("freq_allocation", 21, "freq_allocation"),
        ("freq_allocation", 64, "freq_allocation"),
        ("freq_allocation", 0, "freq_allocation"),
        ("rms_norm_eps", 0, "rms_norm_eps"),
        ("hidden_act", "gelu", "hidden_act"),
        ("use_bias", True, "use_bias"),
        ("rope_3d", False, "rope_3d"),
        ("use_rmsnorm", False, "use_rmsnorm"),
        ("compression_ratio", 2.0, "compression_ratio"),
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
        ("moe_layer_end_index", -2, "moe_layer_end_index is -2"),
        ("moe_layer_end_index", [-1, 5], "moe_layer_end_index"),
        ("moe_layer_interval", 0, "moe_layer_interval"),
        ("mlp_layer_types", ["dense"] * 28, "mlp_layer_types"),
        ("mlp_layer_types", ["dense"] * 27, "mlp_layer_types"),
        ("mlp_layer_types", ["sparse"] * 27 + ["other"], "mlp_layer_types"),
        ("im_patch_id", 103424, "im_patch_id"),
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


def test_the_markers_of_another_vocabulary_must_be_given(tmp_path: Path) -> None:
    config = {key: value for key, value in PUBLISHED.items() if key not in MARKERS}
    assert load_model_config(write(tmp_path, config)) == MODEL
    with pytest.raises(CheckpointError, match="missing field image_start_token_id"):
        load_model_config(write(tmp_path, config | {"im_patch_id": 100294}))


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
    config |= {"freq_allocation": 10, "rope_scaling": {"type": "default", "mrope_section": [11, 11, 10]}}
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
