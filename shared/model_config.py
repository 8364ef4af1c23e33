"""The model's configuration: the hub's flat config.json and transformers' nested one, as one strict struct."""

from pathlib import Path

import msgspec


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


class GenerationDefaults(msgspec.Struct, frozen=True):
    """Sampling defaults: generation_config.json, else the reference server's."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


def load_model_config(directory: Path) -> ModelConfig:
    """Read config.json (either form) and generation_config.json.

    Raises:
        CheckpointError: a field is missing, mistyped or contradicts another; the message names it.
    """
    raise NotImplementedError


def load_generation_defaults(directory: Path) -> GenerationDefaults:
    raise NotImplementedError
