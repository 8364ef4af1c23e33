"""Matrix product with a weight that may be quantised."""

import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels.quantize import Weight, dense


def linear(x: Tensor, weight: Weight) -> Tensor:
    """Return x @ weight^T, accumulated in float32.

    Args:
        x: [N, in].
        weight: [out, in].

    Returns:
        [N, out], dtype of x.
    """
    return F.linear(x, dense(weight))
