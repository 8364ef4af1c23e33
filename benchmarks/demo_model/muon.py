"""The optimizer: Muon for the matrices inside, AdamW for embeddings, norms, biases and routers.

Muon (Jordan et al., 2024) moves a matrix along the nearest orthogonal one of its momentum. Matrices of one shape,
and the experts of a layer, are orthogonalised together.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn


class Muon:
    """Momentum, orthogonalised by a few Newton-Schulz steps in bfloat16."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        self._peak, self._momentum, self._decay = lr, momentum, weight_decay
        groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.shape].append(parameter)
        self._groups = list(groups.values())
        self.buffers = [torch.stack([torch.zeros_like(p) for p in group]) for group in self._groups]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the learning rate."""
        for group, buffer in zip(self._groups, self.buffers, strict=True):
            gradient = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
            buffer.lerp_(gradient, 1 - self._momentum)
            update = _orthogonal(gradient.lerp(buffer, self._momentum))
            rows, columns = buffer.shape[-2:]
            lr = self._peak * scale
            update = update * (-lr * max(1.0, rows / columns) ** 0.5)
            matrices: list[Tensor] = list(group)
            torch._foreach_mul_(matrices, 1 - lr * self._decay)
            torch._foreach_add_(matrices, list(update.to(buffer.dtype).unbind(0)))

    def state(self) -> list[Tensor]:
        """The momenta, in bfloat16."""
        return [buffer.bfloat16() for buffer in self.buffers]

    def load(self, state: list[Tensor]) -> None:
        """Take up momenta of `state`."""
        for buffer, saved in zip(self.buffers, state, strict=True):
            buffer.copy_(saved)


def _orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly: singular values end between 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16().mT if tall else matrices.bfloat16()
    shape = x.shape
    x = x.flatten(0, -3)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.view(shape)
    return found.mT if tall else found


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, all other parameters that are trained)."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        outside = parameter.ndim < 2 or any(part in name for part in ("embed", "lm_head", "gate.weight"))
        (outer if outside else inner).append(parameter)
    return inner, outer


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW as small models like it."""
    options: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0, "fused": True}
    return torch.optim.AdamW(parameters, lr=lr, **options)
