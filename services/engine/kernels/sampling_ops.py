"""The sampler's operations as one value, as `ops.Ops` is for the model."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from services.engine.kernels.reference.argmax import argmax
from services.engine.kernels.reference.mask_logits import mask_logits
from services.engine.kernels.reference.pick import pick
from services.engine.kernels.reference.threshold import threshold


@dataclass(frozen=True, slots=True)
class SamplingOps:
    """Implementations of the operations, with the arguments and results of the torch function of the same name. All
    draw the same tokens from the same probabilities."""

    argmax: Callable[[Tensor], Tensor] = argmax
    mask_logits: Callable[[Tensor, Tensor, Tensor], None] = mask_logits
    threshold: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = threshold
    pick: Callable[[Tensor, Tensor, Tensor], Tensor] = pick
