"""The outside judge: transformers' own ERNIE-4.5-VL, on small checkpoints.

Importing this module makes transformers importable where torchvision's compiled operators cannot load (a CUDA wheel
beside a CPU torch); every test that needs transformers imports it from here.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def _make_torchvision_importable() -> torch.library.Library | None:
    """Declare the two operators torchvision's Python side registers fakes for, where its C++ side is absent."""
    with contextlib.suppress(RuntimeError):
        import torchvision

        return None
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

    return library


_torchvision_ops = _make_torchvision_importable()  # the declarations live as long as this object

from transformers import (  # noqa: E402
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from cli.demo import hub_config, write_demo  # noqa: E402

disable_progress_bar()

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "generation_config.json",
    "Roboto-Regular.ttf",
)

Model = Ernie4_5_VLMoeForConditionalGeneration

NEAR_TIE = 4e-4  # between logits in float32: ten times what the order of sums was seen to change


def hf_config(hub: dict[str, Any]) -> Ernie4_5_VLMoeConfig:
    """transformers' configuration for a hub config.json.

    transformers wants a video placeholder id of its own, which no prompt of ours contains: the last row of the
    vocabulary, whose embedding is always overwritten.
    """
    vision, frequencies = hub["vision_config"], hub["hidden_size"] // hub["num_attention_heads"] // 2
    spatial = (frequencies - hub["freq_allocation"]) // 2
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "moe_intermediate_size", "moe_k")
    same += ("moe_num_shared_experts", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    rope = {"rope_theta": hub["rope_theta"], "mrope_section": [spatial, spatial, hub["freq_allocation"]]}
    return Ernie4_5_VLMoeConfig(
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


def save_with_transformers(
    directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "2MB"
) -> Model:
    """A small model made and saved by transformers: its config.json, its shards; the demo's tokenizer beside them.

    Returns the model that was saved, in `dtype` (router in float32).
    """
    demo = directory.parent / f"{directory.name}-demo"
    write_demo(demo)
    hub = hub_config("float32")
    torch.manual_seed(seed)
    model = Model._from_config(hf_config(hub)).eval().float()
    _scatter(model, first_unlikely=hub["im_patch_id"])
    model = _cast(model, dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:
        shutil.copyfile(demo / name, directory / name)
    return model


def _scatter(model: Model, first_unlikely: int) -> None:
    """Random weights wide enough that experts and greedy tokens vary; norms and biases that are not neutral."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name:
                tensor.normal_(0, 0.3)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.normal_(1, 0.1)
            elif name.endswith(("weight", "proj", "bias")):
                tensor.normal_(0, 0.15)
        model.get_input_embeddings().weight[first_unlikely:] *= 0.2


def _cast(model: Model, dtype: torch.dtype) -> Model:
    precise = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "gate.weight" in name or "moe_statics" in name
    }
    model = model.to(dtype)
    for name, tensor in precise.items():
        owner, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(owner), leaf).data = tensor
    return model


def load_transformers(directory: Path, dtype: torch.dtype = torch.float32) -> Model:
    """A checkpoint in either form, in transformers: the very files our engine reads."""
    raw = json.loads((directory / "config.json").read_bytes())
    config = (
        hf_config(raw) if raw["model_type"] == "ernie4_5_moe_vl" else Ernie4_5_VLMoeConfig.from_pretrained(directory)
    )
    model, report = Model.from_pretrained(directory, config=config, dtype=dtype, output_loading_info=True)
    left = {kind: names for kind, names in report.items() if names and kind != "unexpected_keys"}
    unexpected = set(report["unexpected_keys"]) - {"lm_head.weight"}
    if left or unexpected:
        raise AssertionError(f"transformers could not load all of {directory}: {left}, unexpected {unexpected}")
    return model.eval()


def hf_inputs(
    model: Model,
    ids: Sequence[int],
    *,
    images: tuple[torch.Tensor, torch.Tensor] | None = None,
    videos: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """What transformers' forward wants for one prompt of ours, batch dimension 1.

    `ids` is the prompt as our engine sees it: one placeholder id for images and videos. `images` and `videos` are
    (normalised patch rows [N, 588], grids [n, 3]) of all items of the kind, in prompt order.
    """
    config = model.config
    tokens, kinds, routed = [], [], []
    in_video = False
    for token in ids:
        in_video = (in_video or token == config.video_start_token_id) and token != config.video_end_token_id
        placeholder = token == config.image_token_id
        kinds.append((2 if in_video else 1) if placeholder else 0)
        # The reference server's rule: every id from the placeholder's on goes to the vision experts.
        routed.append(int(token >= config.image_token_id))
        tokens.append(config.video_token_id if placeholder and in_video else token)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([tokens]),
        "mm_token_type_ids": torch.tensor([kinds]),
        "moe_mm_token_type_ids": torch.tensor([routed]),
    }
    dtype = model.model.vision_tower.dtype
    if images is not None:
        inputs |= {"pixel_values": images[0].to(dtype), "image_grid_thw": images[1]}
    if videos is not None:
        inputs |= {"pixel_values_videos": videos[0].to(dtype), "video_grid_thw": videos[1]}
        _check_positions_agree(videos[1])
    return inputs


def _check_positions_agree(grids: torch.Tensor) -> None:
    """transformers ignores time in the position after a video; we, as the reference server, do not."""
    for frames, height, width in grids.tolist():
        if frames // 2 > max(height, width) // 2:
            raise AssertionError(f"a video of grid {(frames, height, width)} is one on which transformers disagrees")


def hf_logits(model: Model, ids: Sequence[int], **media: Any) -> torch.Tensor:
    """Logits [len(ids), vocab] in float32; `media` as `hf_inputs`."""
    with torch.no_grad():
        return model(**hf_inputs(model, ids, **media)).logits[0].float()


def hf_generate(
    model: Model, ids: Sequence[int], max_new_tokens: int, *, ignore_eos: bool = False, **media: Any
) -> list[int]:
    """transformers' greedy continuation, the end token included if it came; `media` as `hf_inputs`.

    Raises:
        AssertionError: a generated id is one of the vision experts', which transformers routes otherwise than the
            reference server does, or in float32 hangs on how sums are rounded, which no two processors need do alike;
            take another prompt.
    """
    inputs = hf_inputs(model, ids, **media)
    stop = {"eos_token_id": None} if ignore_eos else {}
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            output_logits=True,
            return_dict_in_generate=True,
            **stop,
        )
    generated: list[int] = output.sequences[0, len(ids) :].tolist()
    likeliest = torch.cat(output.logits).topk(2).values
    margin = float((likeliest[:, 0] - likeliest[:, 1]).min())
    if model.dtype == torch.float32 and margin < NEAR_TIE:
        raise AssertionError(f"two tokens are within {margin:.1e} of being equally likely; take another prompt")
    if max(generated) >= model.config.image_token_id:
        raise AssertionError(f"{max(generated)} was generated, which transformers and we route differently")
    return generated
