"""The model that is trained: transformers' own class, and its forward pass on padded batches without waiting.

The weights and their use are transformers'. Three things are done in another order, for speed, with the same result
(the test compares them): the experts of a pool are one wide product whose unused parts are set to zero, the frames of
a batch go through the vision tower's attention side by side, and tokens are sent to their pools by indexes that were
made with the batch.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock, Ernie4_5_VLMoeRMSNorm

from benchmarks.demo_model.batches import Batch
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD
from services.mm_encoder.vision.normalise import normalise

Model = Ernie4_5_VLMoeForConditionalGeneration


class Routing(NamedTuple):
    """Indexes of the flattened tokens that go to each pool of experts; padding goes to none."""

    text: Tensor
    vision: Tensor


def build(hub: dict[str, Any], seed: int) -> Model:
    """A fresh model for a hub config.json, with random weights."""
    torch.manual_seed(seed)
    model: Model = Model._from_config(config_of(hub)).float()  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, Ernie4_5_VLMoeMoeBlock):
            module.forward = _moe.__get__(module)  # type: ignore[method-assign]
            for moe in (module.text_moe, module.vision_moe):
                moe.register_buffer("load", torch.zeros(moe.num_experts), persistent=False)
        if isinstance(module, nn.LayerNorm | Ernie4_5_VLMoeRMSNorm):
            module.register_forward_hook(_narrow)
    model.model.resampler_model._temporal_slicing = _pairs_of_frames
    return model


def _narrow(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Under autocast, one conversion after each norm instead of one in each product that follows."""
    return output.to(torch.bfloat16) if torch.is_autocast_enabled(output.device.type) else output


def config_of(hub: dict[str, Any]) -> Ernie4_5_VLMoeConfig:
    """transformers' configuration for a hub config.json, computing as this module does."""
    vision, frequencies = hub["vision_config"], hub["hidden_size"] // hub["num_attention_heads"] // 2
    spatial = (frequencies - hub["freq_allocation"]) // 2
    same: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    same += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "moe_intermediate_size", "moe_k")
    same += ("moe_num_shared_experts", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    rope = {"rope_theta": hub["rope_theta"], "mrope_section": [spatial, spatial, hub["freq_allocation"]]}
    config = Ernie4_5_VLMoeConfig(
        text_config={key: hub[key] for key in same}
        | {"moe_num_experts": hub["moe_num_experts"][0], "rope_parameters": {"rope_type": "default", **rope}},
        vision_config={
            "depth": vision["depth"],
            "hidden_size": vision["hidden_size"],
            "num_heads": vision["num_heads"],
            "patch_size": vision["patch_size"],
            "spatial_merge_size": vision["spatial_merge_size"],
            "intermediate_size": int(vision["hidden_size"] * vision["mlp_ratio"]),
        },
        image_token_id=hub["im_patch_id"],
        image_start_token_id=hub["image_start_token_id"],
        image_end_token_id=hub["image_end_token_id"],
        video_start_token_id=hub["video_start_token_id"],
        video_end_token_id=hub["video_end_token_id"],
        video_token_id=hub["vocab_size"] - 1,
        tie_word_embeddings=hub["tie_word_embeddings"],
    )
    parts: tuple[Any, ...] = (config, config.text_config)
    for part in parts:
        part._attn_implementation = "sdpa"
        part._experts_implementation = "one_product"
    vision_config: Any = config.vision_config
    vision_config._attn_implementation = "side_by_side"
    return config


def answer_logits(model: Model, batch: Batch) -> Tensor:
    """Logits [labels, vocabulary] of the tokens to learn."""
    inner = model.model
    embeds = inner.language_model.embed_tokens(batch["ids"])
    if "pixels" in batch:
        flat = embeds.flatten(0, 1).index_copy(0, batch["places"], _features(model, batch).to(embeds.dtype))
        embeds = flat.view_as(embeds)
    if torch.is_autocast_enabled(embeds.device.type):
        embeds = embeds.to(torch.bfloat16)
    out = inner.language_model(
        inputs_embeds=embeds,
        position_ids=batch["positions"],
        moe_mm_token_type_ids=Routing(batch["text"], batch["vision"]),
        use_cache=False,
    )
    logits: Tensor = model.lm_head(out.last_hidden_state.flatten(0, 1).index_select(0, batch["predict"]))
    return logits


def _features(model: Model, batch: Batch) -> Tensor:
    """The resampler's output for all pictures and videos of the batch."""
    pixels = batch["pixels"]
    mean, std = (torch.tensor(each, device=pixels.device) for each in (CLIP_MEAN, CLIP_STD))
    rows = normalise(pixels, mean, std, torch.float32)
    tower = model.model.vision_tower(
        rows,
        grid_thw=None,
        position_ids=batch["patches"],
        cu_seqlens=torch.tensor([0, len(rows)]),
        max_seqlen=len(rows),
        frame=int(batch["frame"]),
    )
    features: Tensor = model.model.resampler_model(tower.last_hidden_state, (batch["first"], batch["second"]))
    return features


def _pairs_of_frames(tokens: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([tokens.index_select(0, pair[0]), tokens.index_select(0, pair[1])], -1)


def _side_by_side(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, frame: int, **_: Any
) -> tuple[Tensor, None]:
    """Attention inside each frame of `frame` patches: [1, heads, patches, width] in, [1, patches, heads, width] out."""
    q, k, v = (_frames(each[0], frame) for each in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(0, 1)[None], None


def _frames(heads: Tensor, frame: int) -> Tensor:
    """[heads, patches, width] as [frames, heads, patches of one, width]."""
    return heads.view(heads.shape[0], -1, frame, heads.shape[2]).transpose(0, 1)


def _one_product(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """All experts as one gated MLP; what a token's router did not choose is multiplied by zero."""
    count, width = experts.num_experts, experts.intermediate_dim
    gate, up = F.linear(hidden, experts.gate_up_proj.flatten(0, 1)).view(-1, count, 2, width).unbind(2)
    share = torch.zeros(len(hidden), count, dtype=weights.dtype, device=hidden.device).scatter(1, chosen, weights)
    inside = F.silu(gate) * up * share.to(gate.dtype)[:, :, None]
    return F.linear(inside.flatten(1), experts.down_proj.transpose(0, 1).flatten(1))


def _moe(block: Any, hidden: Tensor, routing: Routing) -> tuple[Tensor, None]:
    """Each token through its pool's experts and through the shared ones."""
    flat = hidden.flatten(0, 1)
    out = torch.zeros_like(flat)
    for moe, index in ((block.text_moe, routing.text), (block.vision_moe, routing.vision)):
        if not len(index):
            continue
        tokens = flat.index_select(0, index)
        _, weights, chosen = moe.gate(tokens)
        if block.training:
            ones = torch.ones(chosen.numel(), device=chosen.device)
            moe.load.scatter_add_(0, chosen.flatten(), ones)
        out = out.index_copy(0, index, moe.experts(tokens, chosen, weights).to(out.dtype))
    return out.view_as(hidden) + block.shared_experts(hidden), None


def balance(model: Model, rate: float) -> None:
    """Raise the bias of experts with less than their share of tokens and lower the others': no auxiliary loss."""
    for module in model.modules():
        if isinstance(module, Ernie4_5_VLMoeMoeBlock):
            pools: tuple[Any, ...] = (module.text_moe, module.vision_moe)
            for moe in pools:
                bias = moe.gate.moe_statics.e_score_correction_bias.data
                bias += rate * torch.sign(moe.load.mean() - moe.load)
                moe.load.zero_()


AttentionInterface.register("side_by_side", _side_by_side)
ALL_EXPERTS_FUNCTIONS.register("one_product", _one_product)
