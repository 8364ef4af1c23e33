"""The model's operations as one value: a model is built with the implementations it is to use."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from services.engine.kernels.quantize import Bits, Quantized, Weight, quantize
from services.engine.kernels.reference.embed import embed
from services.engine.kernels.reference.linear_add_norm import linear_add_norm
from services.engine.kernels.reference.logits import logits
from services.engine.kernels.reference.mlp import SwiGLU, mlp_add_norm
from services.engine.kernels.reference.moe import MoE, linear_moe_add_norm
from services.engine.kernels.reference.paged_attention import AttentionLaunch, PagedSequences, paged_attention
from services.engine.kernels.reference.qkv import qkv
from services.engine.kernels.reference.rms_norm import rms_norm
from services.engine.kernels.reference.rotary import rotary_tables


@dataclass(frozen=True, slots=True)
class Ops:
    """Implementations of the operations, with the arguments and results of the torch function of the same name.
    `dataclasses.replace` swaps one.

    Operations are coarse so that a backend can fuse each into as few launches as it can.
    """

    quantize: Callable[[Tensor, Bits], Quantized] = quantize
    embed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = embed
    rotary_tables: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotary_tables
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    qkv: Callable[[Tensor, Weight, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor] = qkv
    paged_attention: Callable[
        [Tensor, Tensor, Tensor, PagedSequences, float, Tensor | None, list[AttentionLaunch] | None], Tensor
    ] = paged_attention
    linear_add_norm: Callable[[Tensor, Weight, Tensor, Tensor, float], tuple[Tensor, Tensor]] = linear_add_norm
    mlp_add_norm: Callable[[Tensor, SwiGLU, Tensor, Tensor, float], tuple[Tensor, Tensor]] = mlp_add_norm
    linear_moe_add_norm: Callable[
        [Tensor, Weight, Tensor, Tensor, MoE, Tensor | None, int, Tensor, float], tuple[Tensor, Tensor]
    ] = linear_moe_add_norm
    logits: Callable[[Tensor, Tensor], Tensor] = logits
