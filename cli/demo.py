"""Writes the demo checkpoint: a few megabytes of random weights in the format, names and files of the published model.

Everything the serving path derives from a checkpoint has the real model's rules and a small size: two pools of experts
of two widths, a dense first layer, grouped-query attention, three-dimensional rotary sections, a vision tower with its
resampler, tied embeddings with the head stored beside them.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from cli import demo_tokenizer
from cli.demo_tokenizer import ADDED_TOKENS, NUM_PIECES, USER_DEFINED_PIECES, write_json, write_tokenizer
from shared.errors import CheckpointError

Dtype = Literal["bfloat16", "float16", "float32"]

FONT = "Roboto-Regular.ttf"  # timestamps are painted into video frames with it
NUM_SHARDS = 3
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 4, 4, 2, 32
DENSE_SIZE, EXPERTS, EXPERT_SIZES, EXPERTS_PER_TOKEN, SHARED_EXPERTS = 256, 8, (64, 32), 2, 2
VOCAB = 2048
VISION_DEPTH, VISION_HIDDEN, VISION_HEADS, VISION_MLP_RATIO, PATCH, CHANNELS = 2, 64, 2, 4, 14, 3

# Wide enough that routing varies and greedy text does not repeat one token; 0.02 gives neither.
STD = 0.15
# Tied rows larger than the rest make a token likelier: thinking closes and answers end within some tens of tokens.
LIKELY_ROWS = {"</think>": 1.8, "</s>": 1.6}
# As in a trained model, placeholders and the rows no token owns are practically never generated.
UNLIKELY_SCALE = 0.2


def write_demo(directory: Path, *, seed: int = 0, dtype: Dtype = "bfloat16") -> None:
    """Write the checkpoint to `directory`, whole or not at all; do nothing where the same one is already there.

    Raises:
        CheckpointError: `directory` holds something that is not a demo checkpoint; it is left alone.
    """
    recipe = _recipe(seed, dtype)
    if _is_demo(directory, recipe):
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir(mode=0o755)
        _write_files(fresh, seed, dtype, recipe)
        if directory.exists():
            directory.rename(Path(scratch, "old"))
        try:
            fresh.rename(directory)
        except OSError:
            # Another process may have finished first; its files are the same if its recipe is.
            if not _is_demo(directory, recipe):
                raise


def _recipe(seed: int, dtype: str) -> str:
    """Changes with whatever changes the files, so that a demo written by an older version is written again."""
    digest = hashlib.sha256(f"{seed} {dtype}".encode())
    for module in (__file__, demo_tokenizer.__file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()


def _is_demo(directory: Path, recipe: str) -> bool:
    """Return whether exactly this demo is there."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        found = json.loads(Path(directory, "config.json").read_bytes())["demo_recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory} is there and is not a demo checkpoint; it is left alone") from error
    return bool(found == recipe)


def _write_files(directory: Path, seed: int, dtype: str, recipe: str) -> None:
    write_json(directory / "config.json", {**hub_config(dtype), "demo_recipe": recipe})
    write_json(directory / "generation_config.json", _generation_config())
    write_json(directory / "preprocessor_config.json", _preprocessor_config())
    write_tokenizer(directory)
    font = resources.files("font_roboto").joinpath("files", FONT)
    (directory / FONT).write_bytes(font.read_bytes())
    _write_shards(directory, dict(_tensors(seed, getattr(torch, dtype))))


def hub_config(dtype: str) -> dict[str, Any]:
    """config.json in the hub's flat form, with all of its keys but auto_map, which names code that is not here."""
    ids = {text: NUM_PIECES + i for i, text in enumerate(ADDED_TOKENS)}
    frequencies = HEAD_DIM // 2
    of_time, of_height = frequencies // 4, frequencies * 3 // 8
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_moe_vl",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE_SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "use_bias": False,
        "use_cache": True,
        "use_rmsnorm": True,
        "rope_theta": 500000.0,
        "rope_3d": True,
        "rope_scaling": {"type": "default", "mrope_section": [of_height, of_height, of_time]},
        "freq_allocation": of_time,
        "compression_ratio": 1.0,
        "tie_word_embeddings": True,
        "moe_num_experts": [EXPERTS, EXPERTS],
        "moe_intermediate_size": list(EXPERT_SIZES),
        "moe_k": EXPERTS_PER_TOKEN,
        "moe_num_shared_experts": SHARED_EXPERTS,
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [LAYERS + 1, LAYERS],
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "moe_gate": "topk",
        "moe_gate_act": "softmax",
        "moe_norm_gate_logits": True,
        "moe_use_hard_gate": True,
        "moe_use_token_type_bias": False,
        "moe_dense_experts_token_type_id": 3,
        "moe_capacity": [128, 128, 128],
        "moe_group": "mp",
        "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
        "modality_detach": False,
        "mm_vocab_size": 0,
        "max_text_id": ids["<|IMAGE_PLACEHOLDER|>"],
        "im_patch_id": ids["<|IMAGE_PLACEHOLDER|>"],
        "image_start_token_id": ids["<|IMAGE_START|>"],
        "image_end_token_id": ids["<|IMAGE_END|>"],
        "video_start_token_id": ids["<|VIDEO_START|>"],
        "video_end_token_id": ids["<|VIDEO_END|>"],
        "pixel_hidden_size": VISION_HIDDEN,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        "transformers_version": "4.57.1",
        "vision_config": {
            "model_type": "DFNRope_vision_transformer",
            "depth": VISION_DEPTH,
            "embed_dim": VISION_HIDDEN,
            "hidden_size": VISION_HIDDEN,
            "hidden_act": "quick_gelu",
            "mlp_ratio": VISION_MLP_RATIO,
            "num_heads": VISION_HEADS,
            "in_channels": CHANNELS,
            "in_chans": CHANNELS,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "spatial_merge_size": 2,
            "attn_implementation": "eager",
            "attn_sep": True,
            "dtype": dtype,
            "vit_first_fwd_bsz": 128,
        },
    }


def _generation_config() -> dict[str, Any]:
    return {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.8,
        "repetition_penalty": 1.0,
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "image_processor_type": "Ernie4_5_VLImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "min_pixels": 56 * 56,
        "max_pixels": 6177 * 28 * 28,
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_conv_size": 2,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


class _Random:
    """Draws the tensors one after another from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def weight(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * STD).to(self._dtype)

    def gain(self, size: int) -> Tensor:
        """Near one, as a norm's weight is, but not one: a reader that forgets it is found out."""
        return (1 + torch.randn(size, generator=self._generator) * 0.1).to(self._dtype)

    def precise(self, *shape: int, std: float = STD) -> Tensor:
        """Return whether the published checkpoint stores a tensor in float32: the router's."""
        return torch.randn(shape, generator=self._generator) * std


def _tensors(seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name on the hub."""
    random = _Random(seed, dtype)
    embedding = _embedding(random)
    yield "model.embed_tokens.weight", embedding
    for i in range(LAYERS):
        yield from _layer(f"model.layers.{i}.", random, dense=i == 0)
    yield "model.norm.weight", random.gain(HIDDEN)
    yield "lm_head.weight", embedding.clone()
    yield from _vision(random)
    yield from _resampler(random)


def _embedding(random: _Random) -> Tensor:
    rows = random.weight(VOCAB, HIDDEN)
    rows[NUM_PIECES:] *= UNLIKELY_SCALE
    # Ids of the model's own pieces: <unk>, <s>, </s>, the control symbols, then the user-defined ones.
    first_user_defined = 3 + len(demo_tokenizer.CONTROL_PIECES)
    ids = {"</s>": 2} | {text: first_user_defined + i for i, text in enumerate(USER_DEFINED_PIECES)}
    for text, scale in LIKELY_ROWS.items():
        rows[ids[text]] *= scale
    return rows


def _layer(prefix: str, random: _Random, *, dense: bool) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}input_layernorm.weight", random.gain(HIDDEN)
    yield f"{prefix}post_attention_layernorm.weight", random.gain(HIDDEN)
    yield f"{prefix}self_attn.q_proj.weight", random.weight(HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}self_attn.k_proj.weight", random.weight(KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}self_attn.v_proj.weight", random.weight(KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}self_attn.o_proj.weight", random.weight(HIDDEN, HEADS * HEAD_DIM)
    if dense:
        yield from _swiglu(f"{prefix}mlp.", DENSE_SIZE, random)
        return
    yield f"{prefix}mlp.gate.weight", random.precise(HIDDEN, EXPERTS)
    yield f"{prefix}mlp.gate.weight_1", random.precise(HIDDEN, EXPERTS)
    yield f"{prefix}mlp.moe_statics.e_score_correction_bias", random.precise(2, EXPERTS, std=0.3)
    for expert in range(2 * EXPERTS):
        yield from _swiglu(f"{prefix}mlp.experts.{expert}.", EXPERT_SIZES[expert // EXPERTS], random)
    yield from _swiglu(f"{prefix}mlp.shared_experts.", SHARED_EXPERTS * EXPERT_SIZES[0], random)


def _swiglu(prefix: str, size: int, random: _Random) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}gate_proj.weight", random.weight(size, HIDDEN)
    yield f"{prefix}up_proj.weight", random.weight(size, HIDDEN)
    yield f"{prefix}down_proj.weight", random.weight(HIDDEN, size)


def _vision(random: _Random) -> Iterator[tuple[str, Tensor]]:
    width = VISION_HIDDEN
    yield "vision_model.patch_embed.proj.weight", random.weight(width, CHANNELS * PATCH * PATCH)
    for j in range(VISION_DEPTH):
        prefix = f"vision_model.blocks.{j}."
        yield from _layer_norm(f"{prefix}norm1.", width, random)
        yield from _linear(f"{prefix}attn.qkv.", 3 * width, width, random)
        yield from _linear(f"{prefix}attn.proj.", width, width, random)
        yield from _layer_norm(f"{prefix}norm2.", width, random)
        yield from _linear(f"{prefix}mlp.fc1.", VISION_MLP_RATIO * width, width, random)
        yield from _linear(f"{prefix}mlp.fc2.", width, VISION_MLP_RATIO * width, random)
    yield from _layer_norm("vision_model.ln.", width, random)


def _resampler(random: _Random) -> Iterator[tuple[str, Tensor]]:
    width = 4 * VISION_HIDDEN  # a token is 2 x 2 patches
    for name, inputs in (("spatial", width), ("temporal", 2 * width)):
        prefix = f"model.resampler_model.{name}_linear."
        yield from _linear(f"{prefix}0.", width, inputs, random)
        yield from _linear(f"{prefix}2.", width, width, random)
        yield from _layer_norm(f"{prefix}3.", width, random)
    yield from _linear("model.resampler_model.mlp.", HIDDEN, width, random)
    yield "model.resampler_model.after_norm.weight", random.gain(HIDDEN)


def _linear(prefix: str, outputs: int, inputs: int, random: _Random) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}weight", random.weight(outputs, inputs)
    yield f"{prefix}bias", random.weight(outputs)


def _layer_norm(prefix: str, size: int, random: _Random) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}weight", random.gain(size)
    yield f"{prefix}bias", random.weight(size)


def _write_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Safetensors shards of about equal size, and the index that says which tensor is where."""
    total = sum(t.nbytes for t in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[written * NUM_SHARDS // total][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for k, shard in enumerate(shards, 1):
        file = f"model-{k:05}-of-{NUM_SHARDS:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        os.chmod(directory / file, 0o644)
        weight_map |= dict.fromkeys(shard, file)
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
