"""The CUDA choice of operations."""

from services.engine.kernels.gpu.experts import experts
from services.engine.kernels.gpu.kv_write import kv_write
from services.engine.kernels.gpu.linear import linear
from services.engine.kernels.gpu.paged_attention import paged_attention
from services.engine.kernels.gpu.rms_norm import add_rms_norm, rms_norm
from services.engine.kernels.gpu.rotary import rotary
from services.engine.kernels.gpu.router import router
from services.engine.kernels.gpu.silu_mul import silu_mul
from services.engine.kernels.ops import Ops


def gpu_ops() -> Ops:
    """Triton where it pays; lookups and plain products stay torch's."""
    return Ops(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        linear=linear,
        rotary=rotary,
        kv_write=kv_write,
        paged_attention=paged_attention,
        silu_mul=silu_mul,
        router=router,
        experts=experts,
    )
