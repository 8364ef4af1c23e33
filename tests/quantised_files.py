"""Quantised forms of a model directory: by the compressed-tensors library itself, and as AWQ and GPTQ lay them out.

The last two are written from their published layouts, value by value: their packages need a GPU to install. Each comes
with the directory of the weights that it stands for, dequantised in float32.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle  # noqa: F401 - transformers, which the library imports, is imported from there
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils.match import match_name, match_targets
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
# Of a module's weight: its tensors by suffix, and the weight they stand for.
Quantise = Callable[[Tensor], tuple[Tensors, Tensor]]
# Of a module's name: how its weight is quantised, if it is.
Choose = Callable[[str], Quantise | None]

PROJECTION = re.compile(r"(.+\.layers\.\d+\.(?:self_attn|mlp)\..*[qkvoenp]_proj)\.weight")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word has


def write_quantised(source: Path, target: Path, quantise: Quantise, config: dict[str, Any]) -> tuple[Path, Path]:
    """Write the directory with its decoder's projections quantised, and its dequantised form."""
    return write_chosen(source, target, lambda module: quantise, config)


def write_chosen(source: Path, target: Path, choose: Choose, config: dict[str, Any]) -> tuple[Path, Path]:
    """Write the same with each projection quantised by what is chosen for its module's name, if anything is."""
    quantised, dequantised = target / "quantised", target / "dequantised"
    stored: Tensors = {}
    plain: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            match = PROJECTION.fullmatch(name)
            if match and (quantise := choose(match[1])):
                parts, plain[name] = quantise(tensor)
                stored |= {f"{match[1]}.{suffix}": part for suffix, part in parts.items()}
            else:
                stored[name] = plain[name] = tensor
    assert len(stored) > len(plain)
    for directory, tensors, changes in (
        (quantised, stored, {"quantization_config": config}),
        (dequantised, plain, {"torch_dtype": "float32"}),
    ):
        directory.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and "index" not in path.name:
                shutil.copyfile(path, directory / path.name)
        read = json.loads((source / "config.json").read_bytes())
        (directory / "config.json").write_text(json.dumps(read | changes))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return quantised, dequantised


def with_library(**weights: Any) -> tuple[Quantise, dict[str, Any]]:
    """Return the library's quantising by these arguments, and the quantization_config that it writes."""
    args = QuantizationArgs(type="int", **weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        groups = weight.view(len(weight), -1, args.group_size or weight.shape[-1])
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        stored = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(stored, scheme)
        exact = packed | {"weight_scale": packed["weight_scale"].float()}
        return packed, PackedQuantizationCompressor.decompress(exact, scheme)["weight"]

    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    return quantise, {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "ignore": ["lm_head", "re:.*gate$", "re:.*vision.*", "re:.*resampler.*"],
        "kv_cache_scheme": None,
    }


def with_groups(
    *groups: tuple[list[str], dict[str, Any]], ignore: tuple[str, ...] = ()
) -> tuple[Choose, dict[str, Any]]:
    """Return what the library chooses for a module by groups of targets and arguments, and the quantization_config."""
    written = [with_library(**weights) for _, weights in groups]
    by_target = {
        target: quantise for (targets, _), (quantise, _) in zip(groups, written, strict=True) for target in targets
    }
    linear = torch.nn.Linear(1, 1)

    def choose(module: str) -> Quantise | None:
        found = match_targets(module, linear, by_target)
        return None if any(match_name(module, name) for name in ignore) else by_target[found[0]] if found else None

    config_groups = {
        f"group_{i}": config["config_groups"]["group_0"] | {"targets": targets}
        for i, ((targets, _), (_, config)) in enumerate(zip(groups, written, strict=True))
    }
    return choose, written[0][1] | {"config_groups": config_groups, "ignore": list(ignore)}


def _integers(weight: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q and the groups' scales and zero points as [in, ..], and the weight they stand for, [out, in]."""
    grouped = weight.T.float().reshape(-1, group, len(weight))
    low, high = grouped.amin(1), grouped.amax(1)
    scale = (grouped.abs().amax(1) / 7 if symmetric else (high - low) / 15).half().clamp(min=1e-4)
    zero = torch.full_like(low, 8) if symmetric else (-low / scale.float()).round().clamp(1, 15)
    q = (grouped / scale.float().unsqueeze(1) + zero.unsqueeze(1)).round().clamp(0, 15)
    exact = (q - zero.unsqueeze(1)) * scale.float().unsqueeze(1)
    return q.flatten(0, 1).int(), scale, zero.int(), exact.flatten(0, 1).T.contiguous()


def _words(values: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack eight values along a dimension to an int32, the one at order[0] in its lowest bits."""
    values = values.movedim(dim, 0).long()
    words = sum(values[order[i] :: 8] << (4 * i) for i in range(8))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).int().movedim(0, dim).contiguous()


def awq(group: int) -> tuple[Quantise, dict[str, Any]]:
    """Return AWQ's quantising, with zero points, and its quantization_config."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        q, scale, zero, exact = _integers(weight, group, symmetric=False)
        return {"qweight": _words(q, 1, AWQ_ORDER), "qzeros": _words(zero, 1, AWQ_ORDER), "scales": scale}, exact

    return quantise, {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}


def gptq(group: int, symmetric: bool, version: int = 1) -> tuple[Quantise, dict[str, Any]]:
    """Return GPTQ's quantising and its quantization_config."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        q, scale, zero, exact = _integers(weight, group, symmetric)
        order = torch.arange(len(q), dtype=torch.int32) // group
        zeros = _words(zero - (2 - version), 1)
        return {"qweight": _words(q, 0), "qzeros": zeros, "scales": scale, "g_idx": order}, exact

    form = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "desc_act": False, **form}
    return quantise, config
