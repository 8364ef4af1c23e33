"""Quantised weights of ours in the form of compressed-tensors (`pack-quantized`), which other engines read as well.

A scale of four bits is the product of a group's and its row's, which float32 holds exactly for rows of bfloat16 and
float16: `integers.py` finds both again. Of eight bits it is the row's.
"""

from typing import Any

import torch
from torch import Tensor

from services.engine.kernels.quantize import GROUP, Quantized, group_scales, values_of
from services.engine.model.weights import widths
from shared.model.config_file import Quantization
from shared.model.stored_quantization import OWN

# By the names of our files, and by those that vLLM and SGLang give their modules: they ask for `text_experts.0.up_proj`
# and `vision_experts.0.up_proj`, and SGLang for the joined `qkv_proj` and `gate_up_proj`.
EXPERTS = r"re:.*experts\.\d+\.(gate|up|down)_proj$"
DENSE = (r"re:.*\.self_attn\.(q|k|v|qkv|o)_proj$", r"re:.*\.(mlp|shared_experts)\.(gate|up|gate_up|down)_proj$")
# For readers that take every linear layer for quantised, or want a group for each. A router is `mlp.gate`, theirs
# `mlp.text_experts_gate`.
IGNORED = ("lm_head", "re:.*gate$", "re:.*vision_model.*", "re:.*vision_tower.*", "re:.*resampler_model.*")


def stored_form(weight: Quantized) -> dict[str, Tensor]:
    """Return the tensors of a weight [out, in], by what follows the module's name."""
    values = values_of(weight)
    scale = weight.scale.unsqueeze(-1)
    if weight.groups is not None:
        groups = -(-weight.in_features // GROUP)
        scale = group_scales(weight.groups)[:, :groups] * scale.float()
    return {
        "weight_packed": _words(values, weight.bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(values.shape),
    }


def _words(values: Tensor, bits: int) -> Tensor:
    """Pack int8 values, each more by half of their range, along the inputs to int32, the first in the lowest bits."""
    unsigned = values.view(torch.uint8) + (1 << (bits - 1))  # bytes wrap
    padded = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % (32 // bits)))
    if bits == 4:
        padded = padded[:, ::2] | (padded[:, 1::2] << 4)
    return padded.contiguous().view(torch.int32)


def quantization_config(quantization: Quantization) -> dict[str, Any]:
    """Return the field of config.json that describes these files."""
    dense_bits, expert_bits = widths(quantization)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": _group((EXPERTS,), expert_bits),
            "group_1": _group(DENSE, dense_bits),
        },
        "ignore": list(IGNORED),
        "kv_cache_scheme": None,
        OWN: quantization,
    }


def _group(targets: tuple[str, ...], bits: int | None) -> dict[str, Any]:
    form = {"strategy": "group", "group_size": GROUP} if bits == 4 else {"strategy": "channel", "group_size": None}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **form}
    return {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None}
