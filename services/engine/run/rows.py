"""Check that what the CPU computes for a row does not depend on the rows beside it."""

import torch

from services.engine.kernels.reference.linear import linear

INPUTS, OUTPUTS = 256, 512
COUNTS = (1, 2, 5, 16, 33)


def rows_depend_on_others(dtype: torch.dtype) -> bool:
    """Return True if a product gives a row other bits with more rows beside it, as many libraries do."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype)
    rows = torch.randn(max(COUNTS), INPUTS, generator=generator).to(dtype)
    whole = linear(rows, weight)
    return not all(torch.equal(linear(rows[:count], weight), whole[:count]) for count in COUNTS)
