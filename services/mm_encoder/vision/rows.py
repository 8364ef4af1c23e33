"""What is computed for each row by itself, a bounded number of rows at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from services.mm_encoder.vision.memory import ROWS


def spans(total: int) -> Iterator[slice]:
    """[0, total) in parts of at most ROWS."""
    return (slice(start, min(start + ROWS, total)) for start in range(0, total, ROWS))


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of `x`, whose rows do not depend on each other."""
    return torch.cat([function(x[rows]) for rows in spans(len(x))])
