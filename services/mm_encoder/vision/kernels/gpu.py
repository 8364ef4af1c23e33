"""The vision tower's operations for CUDA devices."""

from services.mm_encoder.vision.kernels.attention import attend
from services.mm_encoder.vision.kernels.rowwise import add_norm, quick_gelu, rotate
from services.mm_encoder.vision.ops import Ops


def gpu_ops() -> Ops:
    """Return Triton's operations."""
    return Ops(add_norm, rotate, attend, quick_gelu, captured=True)
