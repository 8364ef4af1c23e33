"""Operations for CUDA devices."""

from services.engine.kernels.ops import Ops
from services.engine.kernels.sampling_ops import SamplingOps
from services.engine.kernels.triton.attention.paged_attention import paged_attention
from services.engine.kernels.triton.attention.qkv import qkv
from services.engine.kernels.triton.attention.rotary_tables import rotary_tables
from services.engine.kernels.triton.dense.logits import logits
from services.engine.kernels.triton.dense.mlp import linear_add_norm, mlp_add_norm
from services.engine.kernels.triton.dense.quantize import quantize
from services.engine.kernels.triton.dense.rms_norm import rms_norm
from services.engine.kernels.triton.moe.moe import linear_moe_add_norm
from services.engine.kernels.triton.sampling.argmax import argmax
from services.engine.kernels.triton.sampling.mask_logits import mask_logits
from services.engine.kernels.triton.sampling.pick import pick
from services.engine.kernels.triton.sampling.threshold import threshold


def gpu_ops() -> Ops:
    """Return Triton's operations where they pay; lookups and plain products stay torch's."""
    return Ops(
        quantize=quantize,
        rotary_tables=rotary_tables,
        rms_norm=rms_norm,
        qkv=qkv,
        paged_attention=paged_attention,
        linear_add_norm=linear_add_norm,
        mlp_add_norm=mlp_add_norm,
        linear_moe_add_norm=linear_moe_add_norm,
        logits=logits,
    )


def gpu_sampling_ops() -> SamplingOps:
    """Return Triton's sampling operations."""
    return SamplingOps(argmax=argmax, mask_logits=mask_logits, threshold=threshold, pick=pick)
