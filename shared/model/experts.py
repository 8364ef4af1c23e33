"""Experts of a config.json: their number, and the layers that have them."""

from shared.errors import CheckpointError
from shared.model.config_file import TextFields, agreed, agreed_or_warn, require

_LAST_LAYER = -1


def num_experts(text: TextFields) -> int:
    """Return the number of experts in each of the two pools, text and vision."""
    pair = _pair("moe_num_experts", text.moe_num_experts)
    require(pair[0] == pair[1], f"moe_num_experts is {list(pair)}: both pools must have as many")
    require(text.moe_k <= pair[0], f"moe_k {text.moe_k} is more than moe_num_experts {pair[0]}")
    return pair[0]


def dense_layers(text: TextFields, warnings: list[str]) -> tuple[int, ...]:
    """Return the layers that have a dense MLP instead of experts."""
    types = text.mlp_layer_types
    if types is not None:
        require(
            len(types) == text.num_hidden_layers,
            f"mlp_layer_types has {len(types)} entries for num_hidden_layers {text.num_hidden_layers}",
        )
    ranged = None if text.moe_layer_start_index is None else _dense_layers_of_range(text, warnings)
    listed = None if types is None else tuple(i for i, kind in enumerate(types) if kind == "dense")
    return agreed({"mlp_layer_types": listed, "moe_layer_start_index": ranged})


def _dense_layers_of_range(text: TextFields, warnings: list[str]) -> tuple[int, ...]:
    """Return the layers outside of the MoE range, which must be the same for both pools.

    Layer i is MoE if start <= i <= end and i + 1 is a multiple of the interval.
    """
    starts = _pair("moe_layer_start_index", text.moe_layer_start_index)
    ends = _moe_ends(text, warnings)
    interval = agreed_or_warn({"moe_layer_interval": text.moe_layer_interval}, 1, warnings)
    pools = [
        tuple(i for i in range(text.num_hidden_layers) if (i + 1) % interval or not start <= i <= end)
        for start, end in zip(starts, ends, strict=True)
    ]
    require(
        pools[0] == pools[1],
        f"moe_layer_start_index {list(starts)} and moe_layer_end_index {list(ends)} put the pools in different layers",
    )
    return pools[0]


def _moe_ends(text: TextFields, warnings: list[str]) -> tuple[int, int]:
    """Return the last MoE layer of each pool. A file may give one behind the last layer, and -1 for the last."""
    name, last = "moe_layer_end_index", text.num_hidden_layers - 1
    if text.moe_layer_end_index is None:
        warnings.append(f"{name} is not given; the last layer, {last}, is taken")
        return last, last
    ends = _pair(name, text.moe_layer_end_index)
    require(min(ends) >= _LAST_LAYER, f"{name} is {text.moe_layer_end_index}; it must be at least {_LAST_LAYER}")
    if _LAST_LAYER in ends:
        warnings.append(f"{name} is {text.moe_layer_end_index}; {_LAST_LAYER} is taken for the last layer, {last}")
    text_end, vision_end = (last if end == _LAST_LAYER else end for end in ends)
    return text_end, vision_end


def _pair(name: str, value: int | list[int] | None) -> tuple[int, int]:
    """Return a fact of the two pools, (text, vision), which is given for each or once for both."""
    if value is None:
        raise CheckpointError(f"missing field {name}")
    if isinstance(value, int):
        return value, value
    require(len(value) == 2, f"{name} {value} is not a pair: one for text, one for vision")
    return value[0], value[1]
