"""Tile shapes of the experts' products, by weight format and by the rows an expert gets on average."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from services.engine.kernels.triton.common.launch import fitting_stages
from services.engine.kernels.triton.dense.matmul import STEP

UNSORTED_PAIRS = 12  # up to here pairs are not sorted: each is a tile of its own


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile shape of one product: weight rows and inputs of a program, its warps and pipeline stages."""

    bn: int  # in the first product, half of them of the gate and half of the up projection
    bk: int
    warps: int
    stages: int

    def options(
        self, x: Tensor, inputs: tuple[tuple[int, int], ...], outputs: tuple[int, ...], bn: int
    ) -> dict[str, Any]:
        """Return launch options for products of any of these sizes, whose programs have `bn` outputs. EVEN: the tiles
        cover the sizes exactly, so nothing is masked.

        Args:
            inputs: of weights, and those that they store.
        """
        even = all(n == stored and n % self.bk == 0 for n, stored in inputs) and not any(n % bn for n in outputs)
        stages = self.stages if x.element_size() == 2 else 1
        return {"EVEN": even, "BN": self.bn, "BK": self.bk, "num_warps": self.warps, "num_stages": stages}


@dataclass(frozen=True, slots=True)
class Plan:
    """Tile shapes of both products."""

    rows: int  # of activations, in a tile of either product
    gate_up: Tile
    down: Tile
    sorted: bool = True  # else each pair is a tile of its own


WIDE = Tile(256, STEP, 8, 3)  # of 64 rows
WIDE_REST = 48 << 10  # bytes of shared memory that it takes beside the stages, at most: with scales of small groups


def plan(pairs: int, experts: int, bits: int) -> Plan:
    """Return the tile shapes for so many pairs. Thresholds measured: see docs/notebook/engine.md."""
    return _fitted({4: _plan4, 8: _plan8, 16: _plan16}[bits](pairs, pairs / experts), bits)


@cache
def _fitted(wanted: Plan, bits: int) -> Plan:
    """Return the plan with no more stages than the device has shared memory for."""

    def fitted(tile: Tile) -> Tile:
        stage = tile.bk * (tile.bn * bits // 8 + wanted.rows * 2)
        return replace(tile, stages=fitting_stages(tile.stages, stage))

    return replace(wanted, gate_up=fitted(wanted.gate_up), down=fitted(wanted.down))


def _plan4(pairs: int, rows_per_expert: float) -> Plan:
    if pairs <= UNSORTED_PAIRS:
        return Plan(8, Tile(32, STEP, 2, 3), Tile(64, STEP, 2, 3), sorted=False)
    if rows_per_expert <= 4:
        return Plan(8, Tile(64, STEP, 2, 3), Tile(64, STEP, 2, 3))
    if rows_per_expert <= 8:
        return Plan(16, Tile(64, STEP, 2, 3), Tile(128, STEP, 4, 3))
    if rows_per_expert > 40:
        return Plan(64, Tile(128, STEP, 4, 2), Tile(128, STEP, 4, 2))
    if rows_per_expert > 16 and _has_room_for_wide_tiles():
        return Plan(64, WIDE, WIDE)
    return Plan(32, Tile(128, STEP, 4, 3), Tile(128, STEP, 4, 3))


def _has_room_for_wide_tiles() -> bool:
    """Return True if the device has shared memory for all their stages, as Hopper has: with fewer they are slower."""
    stage = WIDE.bk * (WIDE.bn // 2 + 64 * 2)
    return fitting_stages(WIDE.stages, stage, WIDE_REST) == WIDE.stages


def _plan8(pairs: int, rows_per_expert: float) -> Plan:
    if pairs <= UNSORTED_PAIRS:
        return Plan(8, Tile(32, 256, 1, 3), Tile(16, 256, 1, 3), sorted=False)
    if rows_per_expert <= 2:
        return Plan(8, Tile(64, 256, 2, 3), Tile(64, 256, 4, 3))
    if rows_per_expert <= 8:
        return Plan(16, Tile(64, 128, 2, 4), Tile(64, 256, 2, 3))
    if rows_per_expert <= 24:
        return Plan(32, Tile(64, 128, 2, 4), Tile(64, 128, 2, 3))
    return Plan(64, Tile(128, 128, 4, 3), Tile(64, 128, 4, 3))


def _plan16(pairs: int, rows_per_expert: float) -> Plan:
    if pairs <= UNSORTED_PAIRS:
        return Plan(8, Tile(64, 128, 4, 4), Tile(16, 128, 1, 4), sorted=False)
    if rows_per_expert <= 8:
        return Plan(16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3))
    if rows_per_expert <= 24:
        return Plan(32, Tile(256, 128, 8, 3), Tile(64, 128, 4, 3))
    return Plan(128, Tile(256, 64, 8, 3), Tile(128, 64, 8, 3))
