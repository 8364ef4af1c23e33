"""Gate of a SwiGLU."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up in float32, cast to the input's dtype.

    Args:
        gate_up: [N, 2 I]: gate, then up.

    Returns:
        [N, I].
    """
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)
