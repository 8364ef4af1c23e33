"""Every operation the model calls, as one value: a model is built with the implementations it is to use."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from services.engine.kernels.embed import embed
from services.engine.kernels.experts import ExpertPool, experts
from services.engine.kernels.kv_write import kv_write
from services.engine.kernels.linear import linear
from services.engine.kernels.logits import logits
from services.engine.kernels.paged_attention import paged_attention
from services.engine.kernels.quantize import Weight
from services.engine.kernels.rms_norm import add_rms_norm, rms_norm
from services.engine.kernels.rotary import rotary, rotary_tables
from services.engine.kernels.router import router
from services.engine.kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class Ops:
    """Arguments and results are those of the torch function of the same name. `dataclasses.replace` swaps one."""

    embed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = embed
    rotary_tables: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotary_tables
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_rms_norm
    linear: Callable[[Tensor, Weight], Tensor] = linear
    rotary: Callable[[Tensor, Tensor, Tensor], None] = rotary
    kv_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = kv_write
    paged_attention: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float],
        Tensor,
    ] = paged_attention
    silu_mul: Callable[[Tensor], Tensor] = silu_mul
    router: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]] = router
    experts: Callable[[Tensor, Tensor, Tensor, ExpertPool, ExpertPool], Tensor] = experts
    logits: Callable[[Tensor, Tensor], Tensor] = logits
