"""The hub's config.json as far as it can be known: unseen, so its keys are those that its readers read.

`READERS` says who reads what. `thinking` and `base` hold all of it, at the published sizes, the first as the file's
readers describe it and the second as the configuration class in the repository's own code would write it; `nested` is
either one as transformers writes it.
"""

import json
from typing import Any

import oracle

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")
_EXPERTS = ("moe_num_experts", "moe_intermediate_size", "moe_k", "moe_num_shared_experts")
_EXPERT_LAYERS = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
_MARKERS = ("im_patch_id", "image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id")
_TOWER = ("vision_config", "pixel_hidden_size", "spatial_conv_size", "temporal_conv_size")

# Keys of the root, and below "vision_config." of the tower.
READERS: dict[str, tuple[str, ...]] = {
    "transformers, convert_ernie4_5_vl_moe_to_hf.py": (
        *("architectures", "tie_word_embeddings", "use_cache", "use_bias", "im_patch_id"),
        *_SIZES,
        *_EXPERTS,
        *_EXPERT_LAYERS,
        *("vision_config", "spatial_conv_size", "temporal_conv_size", "vision_config.depth"),
        *("vision_config.hidden_size", "vision_config.hidden_act", "vision_config.num_heads"),
        *("vision_config.in_channels", "vision_config.patch_size", "vision_config.spatial_merge_size"),
        "vision_config.mlp_ratio",
    ),
    "vLLM, ernie45_vl.py and ernie45_vl_moe.py": (
        *_SIZES,
        *_EXPERTS,
        *_EXPERT_LAYERS,
        *_MARKERS,
        *_TOWER,
        *("rope_scaling", "freq_allocation", "use_bias", "pad_token_id", "tie_word_embeddings"),
    ),
    "SGLang, ernie45_vl.py": (
        *_MARKERS,
        *_TOWER,
        *("rope_scaling", "freq_allocation", "tie_word_embeddings", "moe_num_experts", "rms_norm_eps", "hidden_size"),
    ),
    "mlx-vlm, ernie4_5_moe_vl/config.py, and its test after the Thinking model": (
        *_SIZES,
        *_EXPERTS,
        *_EXPERT_LAYERS,
        *_MARKERS,
        *_TOWER,
        *("use_bias", "tie_word_embeddings", "compression_ratio", "moe_capacity", "moe_use_aux_free", "rope_scaling"),
        *("rope_3d", "freq_allocation", "use_temporal_conv", "eos_token_id", "vision_config.model_type"),
        *("vision_config.depth", "vision_config.embed_dim", "vision_config.hidden_size", "vision_config.hidden_act"),
        *("vision_config.mlp_ratio", "vision_config.num_heads", "vision_config.in_channels"),
        *("vision_config.patch_size", "vision_config.spatial_merge_size"),
    ),
    "FastDeploy, config.py and ernie4_5_vl/configuration.py": (
        *_SIZES,
        *_EXPERTS,
        *("moe_layer_start_index", "moe_layer_end_index", "moe_use_aux_free", "tie_word_embeddings", "torch_dtype"),
        *("rope_scaling", "rope_3d", "freq_allocation", "compression_ratio", "architectures"),
        *("im_patch_id", *_TOWER, "use_temporal_conv", "max_text_id", "mm_vocab_size", "modality_detach"),
        *("moe_use_hard_gate", "moe_use_token_type_bias", "moe_dense_experts_token_type_id"),
    ),
    "PaddleFormers, the model's own test": (
        *("moe_capacity", "moe_gate", "moe_group", "moe_multimodal_dispatch_use_allgather", "moe_use_aux_free"),
        *("use_cache", "use_rmsnorm", "use_bias", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("vision_config.attn_implementation", "vision_config.attn_sep", "vision_config.in_chans"),
        *("vision_config.spatial_patch_size", "vision_config.vit_first_fwd_bsz", "vision_config.dtype"),
    ),
}


def thinking() -> dict[str, Any]:
    """config.json of the Thinking model."""
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_ernie4_5_vl.Ernie4_5_VLMoEConfig",
            "AutoModel": "modeling_ernie4_5_vl.Ernie4_5_VLMoeForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_ernie4_5_vl.Ernie4_5_VLMoeForConditionalGeneration",
            "AutoProcessor": "processing_ernie4_5_vl.Ernie4_5_VLProcessor",
        },
        "bos_token_id": 1,
        "compression_ratio": 1.0,
        "eos_token_id": 2,
        "freq_allocation": 20,
        "hidden_size": 2560,
        "im_patch_id": 100295,
        "image_end_token_id": 101305,
        "image_start_token_id": 101304,
        "intermediate_size": 12288,
        "max_position_embeddings": 131072,
        "max_text_id": 100295,
        "mm_vocab_size": 0,
        "modality_detach": False,
        "model_type": "ernie4_5_moe_vl",
        "moe_capacity": [128, 128, 128],
        "moe_dense_experts_token_type_id": 3,
        "moe_gate": "topk",
        "moe_gate_act": "softmax",
        "moe_group": "mp",
        "moe_intermediate_size": [1536, 512],
        "moe_k": 6,
        "moe_layer_end_index": [29, 28],
        "moe_layer_interval": 1,
        "moe_layer_start_index": [1, 1],
        "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
        "moe_norm_gate_logits": True,
        "moe_num_experts": [64, 64],
        "moe_num_shared_experts": 2,
        "moe_use_aux_free": True,
        "moe_use_hard_gate": True,
        "moe_use_token_type_bias": False,
        "num_attention_heads": 20,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "pixel_hidden_size": 1280,
        "rms_norm_eps": 1e-5,
        "rope_3d": True,
        "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]},
        "rope_theta": 500000,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_bias": False,
        "use_cache": True,
        "use_rmsnorm": True,
        "use_temporal_conv": True,
        "video_end_token_id": 101307,
        "video_start_token_id": 101306,
        "vision_config": {
            "attn_implementation": "eager",
            "attn_sep": True,
            "depth": 32,
            "dtype": "bfloat16",
            "embed_dim": 1280,
            "hidden_act": "quick_gelu",
            "hidden_size": 1280,
            "in_channels": 3,
            "in_chans": 3,
            "mlp_ratio": 4,
            "model_type": "DFNRope_vision_transformer",
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "vit_first_fwd_bsz": 128,
        },
        "vocab_size": 103424,
    }


def base(config: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of the base model, or `config` as the same class would write it: its rope_scaling, all its fields."""
    config = json.loads(json.dumps(config or thinking()))
    config["rope_scaling"] = {"rope_type": "ernie_3d", "freq_allocation": config["freq_allocation"]}
    return config | {
        "add_tail_layers": False,
        "attention_probs_dropout_prob": 0.0,
        "cachekv_quant": False,
        "disable_ffn_model_parallel": False,
        "dpo_config": None,
        "fuse_attn_ffn": True,
        "fuse_rms_norm": False,
        "hidden_dropout_prob": 0.0,
        "ignored_index": -100,
        "initializer_range": 0.02,
        "max_sequence_length": 1024,
        "moe_all_to_all_dropout": 0.0,
        "moe_aux_loss_lambda": 0.01,
        "moe_dropout_prob": 0.0,
        "moe_fuse_experts": False,
        "moe_group_experts": False,
        "moe_layer_feed_fake_token": False,
        "moe_num_attn_experts": False,
        "moe_orthogonal_loss_lambda": 0.01,
        "moe_reverse_token_drop": False,
        "moe_use_size_all2all": False,
        "moe_z_loss_lambda": 0.0001,
        "recompute": False,
        "refined_recompute": {},
        "resampler_fuse_rms_norm": False,
        "sinkhorn_2gate": True,
        "sinkhorn_temp": 0.03,
        "tensor_parallel_degree": 1,
        "token_balance_loss": False,
        "use_flash_attention": True,
        "use_recompute_resampler": False,
        "using_precision_check": False,
        "weight_share_add_bias": True,
    }


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers writes for the same model."""
    return {**json.loads(oracle.hf_config(config).to_json_string()), "dtype": config["torch_dtype"]}


def keys(config: dict[str, Any]) -> set[str]:
    """Keys of the root, and of the tower as `READERS` names them."""
    return set(config) | {f"vision_config.{key}" for key in config["vision_config"]}
