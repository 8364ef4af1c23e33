"""Row-wise operations, a bounded number of rows at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from services.mm_encoder.vision.memory import ROWS


def spans(total: int) -> Iterator[slice]:
    """Split [0, total) into slices of at most ROWS."""
    return (slice(start, min(start + ROWS, total)) for start in range(0, total, ROWS))


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `function`, whose output rows each depend on one input row, to slices of `x`; return all rows."""
    return torch.cat([function(x[rows]) for rows in spans(len(x))])
