"""Matrix product with a weight that may be quantised."""

import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels.quantize import Weight, dense


def linear(x: Tensor, weight: Weight) -> Tensor:
    """Return x @ weight^T, accumulated in float32.

    On a CPU whose sums are reproducible (`shared.reproducible`) a row's result does not depend on the other rows.

    Args:
        x: [N, in].
        weight: [out, in].

    Returns:
        [N, out], dtype of x.
    """
    if len(x) == 1:
        # A product with a vector is another routine, which may sum in another order.
        return F.linear(x.expand(2, -1), dense(weight))[:1]
    return F.linear(x, dense(weight))
