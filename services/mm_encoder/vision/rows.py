"""Row-wise operations, a bounded number of rows at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def spans(total: int, at_once: int) -> Iterator[slice]:
    """Split [0, total) into slices of at most `at_once`."""
    return (slice(start, min(start + at_once, total)) for start in range(0, total, at_once))


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, at_once: int) -> Tensor:
    """Apply `function`, whose output rows each depend on one input row, to slices of `x`; return all rows."""
    return torch.cat([function(x[rows]) for rows in spans(len(x), at_once)])
