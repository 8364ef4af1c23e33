"""Matrix products with one order of sums for each row."""

import torch
from torch import Tensor

from services.engine.kernels.quantize import Weight, bits_of
from services.engine.kernels.triton.common.sizes import ceil_pow2
from services.engine.kernels.triton.dense.linear import LinearTiles, tiled_linear
from services.engine.kernels.triton.dense.matmul import STEP

# By bits of the weight. 64 outputs and 4 warps: one kind of matrix instruction for any number of rows.
INPUTS, STAGES, MOST_ROWS = {4: STEP, 8: 128, 16: 64}, {4: 2, 8: 3, 16: 4}, {4: 64, 8: 64, 16: 128}
OUTPUTS, WARPS, FEWEST_ROWS = 64, 4, 16


def linear(x: Tensor, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Return [1, N, out]: one part, for readers of products in parts.

    Args:
        dtype: of the result; None: that of x.
    """
    bits = bits_of(weight)
    rows = min(MOST_ROWS[bits], max(FEWEST_ROWS, ceil_pow2(len(x))))
    return tiled_linear(x, weight, LinearTiles(rows, OUTPUTS, INPUTS[bits], WARPS, STAGES[bits]), dtype=dtype)
