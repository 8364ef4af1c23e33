"""Counts of the rows that the text pool's experts get in a step."""

import statistics
from collections.abc import Callable, Iterable
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

TILES = (32, 64, 128)  # rows


def expert_loads(run: Callable[[], object], module: ModuleType, experts: int) -> list[Tensor]:
    """Return the rows of each of the first `experts` experts, by layer, in what `run` computes.

    Args:
        module: of the operations that the model has, whose `router` is watched.
    """
    chosen: list[Tensor] = []
    route = module.router

    def watched(*arguments: object) -> tuple[Tensor, Tensor]:
        ids, weights = route(*arguments)
        chosen.append(ids.flatten().long().cpu())
        return ids, weights

    with patch.object(module, "router", watched):
        run()
    return [torch.bincount(ids, minlength=experts)[:experts].double() for ids in chosen]


def spread(loads: Iterable[Tensor]) -> dict[str, float]:
    """Return, on average over the layers: the standard deviation of experts' rows and the most that one has, both
    relative to the mean, and how many tiles of rows they fill."""
    layers = list(loads)
    figures: dict[str, Callable[[Tensor], Tensor]] = {
        "deviation": lambda rows: rows.std() / rows.mean(),
        "most": lambda rows: rows.max() / rows.mean(),
        **{f"tiles_of_{tile}": lambda rows, tile=tile: (rows / tile).ceil().sum() for tile in TILES},  # type: ignore[misc]
    }
    return {name: round(statistics.fmean(float(of(rows)) for rows in layers), 2) for name, of in figures.items()}
