"""Fields of config.json's quantization_config that describe weights which are quantised already, and what is read.

A field that asks for something else is refused by its name and value, before a weight is read.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

Layout = Literal["compressed-tensors", "awq", "gptq", "gptq_v2"]
# Key in quantization_config of files that `millrace quantize` wrote, with the format's name.
OWN = "millrace"
GROUPS = (128, 64, 32)  # inputs that may share a scale, beside all of an output

# Of each layout, the name of the integers behind the module's, and of what belongs to them.
SUFFIXES: dict[Layout, tuple[str, tuple[str, ...]]] = {
    "compressed-tensors": ("weight_packed", ("weight_scale", "weight_zero_point", "weight_shape")),
    "awq": ("qweight", ("scales", "qzeros")),
    "gptq": ("qweight", ("scales", "qzeros", "g_idx")),
    "gptq_v2": ("qweight", ("scales", "qzeros", "g_idx")),
}
_AUTO_ROUND = ("auto-round", "intel/auto-round")
_SUPPORTED = "pack-quantized"
# Other formats of compressed-tensors, in words.
_FORMATS = {
    "float-quantized": "FP8",
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp6-pack-quantized": "MXFP6",
    "mxfp8-quantized": "MXFP8",
    "int-quantized": "integers, with quantised activations",
    "naive-quantized": "integers or FP8, not packed",
    "marlin-24": "sparse weights",
}


def stored_layout(config: dict[str, Any]) -> Layout | None:
    """Return the layout of weights that this quantization_config describes, None for a method that is not read."""
    method = config.get("quant_method")
    if method in _AUTO_ROUND:
        packing = str(config.get("packing_format") or config.get("backend") or "")
        return "gptq" if "gptq" in packing else "awq" if "awq" in packing else None
    if method == "gptq" and config.get("checkpoint_format") == "gptq_v2":
        return "gptq_v2"
    return method if method in get_args(Layout) else None


def stored_format(config: object) -> str | None:
    """Return the name of what is stored: wint4 or wint8 of `millrace quantize`, or a layout."""
    if not isinstance(config, dict):
        return None
    own = config.get(OWN)
    return own if own in ("wint4", "wint8") else stored_layout(config)


@dataclass(frozen=True, slots=True)
class Scheme:
    """Way of quantising that fields describe, of some weights at least."""

    bits: int
    group: int  # inputs that share a scale; 0: all of an output. Rows below it have one scale, too
    symmetric: bool  # False: zero points are stored
    targets: tuple[str, ...] = ()  # names of modules, `re:` and a pattern, or classes of modules


def stored_schemes(config: dict[str, Any]) -> list[Scheme]:
    """Return what these fields describe, but for what `unusable` refuses."""
    if stored_layout(config) == "compressed-tensors":
        groups = [_object(group) for group in _object(config.get("config_groups")).values()]
        read = [(_object(group.get("weights")), _targets(group)) for group in groups]
        asked = [(w.get("num_bits"), w.get("group_size"), w.get("symmetric", True), targets) for w, targets in read]
    else:
        group = config.get("group_size", config.get("q_group_size"))
        asked = [(config.get("bits", config.get("w_bit")), group, True, ())]
    return [
        Scheme(bits, group if group in GROUPS else 0, bool(symmetric), targets)
        for bits, group, symmetric, targets in asked
        if bits in (4, 8)
    ]


def schemes_of(schemes: Collection[Scheme], module: str) -> list[Scheme]:
    """Return the schemes of a module by its name in the files, or all where no target fits.

    As in compressed-tensors, the most exact targets count.
    """
    named = [scheme for scheme in schemes if module in scheme.targets]
    matched = [scheme for scheme in schemes if any(re.match(pattern, module) for pattern in _patterns(scheme.targets))]
    linear = [scheme for scheme in schemes if "Linear" in scheme.targets]
    return named or matched or linear or list(schemes)


def _targets(group: dict[str, Any]) -> tuple[str, ...]:
    targets = group.get("targets")
    return tuple(target for target in targets if isinstance(target, str)) if isinstance(targets, list) else ()


def _patterns(targets: Collection[str]) -> list[str]:
    return [target.removeprefix("re:") for target in targets if target.startswith("re:")]


def unusable(config: dict[str, Any]) -> str | None:
    """Return a sentence about the first field of a known method that asks for what is not read."""
    for name, value, read in _facts(config):
        if value not in read:
            known = f" ({_FORMATS[value]})" if isinstance(value, str) and value in _FORMATS else ""
            return f"{name} is {value!r}{known}; what is read is {' or '.join(map(repr, read))}"
    return next(_bad_patterns(config), None)


def _bad_patterns(config: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence about each target that is no regular expression."""
    for name, group in _object(config.get("config_groups")).items():
        for pattern in _patterns(_targets(_object(group))):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                yield f"config_groups.{name}.targets has 're:{pattern}', which is no regular expression: {error}"


Fact = tuple[str, Any, tuple[Any, ...]]


def _facts(config: dict[str, Any]) -> Iterator[Fact]:
    """Yield fields, with their values and those that are read."""
    layout = stored_layout(config)
    if layout == "compressed-tensors":
        yield from _compressed_tensors(config)
        return
    yield "bits", config.get("bits", config.get("w_bit")), (4,) if layout == "awq" else (4, 8)
    yield "group_size", config.get("group_size", config.get("q_group_size")), (*GROUPS, -1)
    if layout == "awq" and config.get("quant_method") == "awq":
        yield "version", str(config.get("version", "gemm")).lower(), ("gemm",)
    if config.get("quant_method") == "gptq":
        yield "checkpoint_format", config.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2")
    yield "desc_act", bool(config.get("desc_act")) and not config.get("static_groups"), (False,)
    yield "act_bits", config.get("act_bits") or 16, (16, 32)
    yield "data_type", config.get("data_type", "int"), ("int",)


def _compressed_tensors(config: dict[str, Any]) -> Iterator[Fact]:
    groups = _object(config.get("config_groups"))
    mixed = config.get("format") == "mixed-precision"
    if not mixed:
        yield "format", config.get("format"), (_SUPPORTED,)
    yield "sparsity_config.format", _object(config.get("sparsity_config")).get("format", "dense"), ("dense",)
    yield "transform_config", _object(config.get("transform_config")).get("config_groups") or {}, ({},)
    yield "config_groups", bool(groups) or None, (True,)
    for name, group in groups.items():
        weights = _object(_object(group).get("weights"))
        at = f"config_groups.{name}"
        if mixed:
            yield f"{at}.format", _object(group).get("format"), (_SUPPORTED,)
        yield f"{at}.input_activations", _object(group).get("input_activations"), (None,)
        yield f"{at}.output_activations", _object(group).get("output_activations"), (None,)
        yield f"{at}.weights.type", weights.get("type", "int"), ("int",)
        yield f"{at}.weights.num_bits", weights.get("num_bits"), (4, 8)
        yield f"{at}.weights.symmetric", weights.get("symmetric", True), (True, False)
        yield f"{at}.weights.strategy", weights.get("strategy"), ("group", "channel")
        if weights.get("strategy") == "group":
            yield f"{at}.weights.group_size", weights.get("group_size"), GROUPS
        order = weights.get("actorder")
        yield f"{at}.weights.actorder", None if order in ("static", "weight", False) else order, (None,)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
