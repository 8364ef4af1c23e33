"""Batch-invariant operations for CUDA devices."""

from services.engine.kernels.ops import Ops
from services.engine.kernels.triton.attention.rotary_tables import rotary_tables
from services.engine.kernels.triton.dense.quantize import quantize
from services.engine.kernels.triton.dense.rms_norm import rms_norm
from services.engine.kernels.triton.invariant.attention import paged_attention
from services.engine.kernels.triton.invariant.dense import linear_add_norm, logits, mlp_add_norm, qkv
from services.engine.kernels.triton.invariant.moe import linear_moe_add_norm


def invariant_ops() -> Ops:
    """Return operations whose rows do not depend on each other."""
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
