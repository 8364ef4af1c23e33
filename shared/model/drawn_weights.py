"""Weights without a checkpoint: drawn where they are needed, for those who measure (`--load-format dummy`)."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

STD = 0.02  # as models of this family are initialised
# Of the projections of what attention returns. Random attention averages what it sees, so that it adds nearly the same
# vector to all tokens of a prompt. With STD these choose the same experts. Those of a trained model do not, since its
# routers have biases that balance them: docs/notebook/engine.md.
ATTENTION_STD = STD / 8


class DrawnWeights:
    """Every tensor that is asked for exists, and is a function of the seed, its name and the kind of device."""

    def __init__(self, device: torch.device, seed: int = 0, attention_std: float = ATTENTION_STD) -> None:
        """Draw on `device`, where the tensors stay."""
        self._device = device
        self._seed = seed
        self._attention_std = attention_std
        self._generator = torch.Generator(device)

    def get(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return ones for the scale of a norm, zeros for a bias, and else normal numbers."""
        if name.endswith("bias"):
            return torch.zeros(*shape, device=self._device)
        if len(shape) == 1:
            return torch.ones(*shape, device=self._device)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        self._generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        std = self._attention_std if name.endswith("self_attn.o_proj.weight") else STD
        return torch.empty(*shape, device=self._device).normal_(0, std, generator=self._generator)

    def integers(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        """Return None: nothing is quantised."""

    def has(self, name: str) -> bool:
        """Return True but for the head, which is the embedding where a configuration ties them."""
        return not name.startswith("lm_head")

    def check_all_used(self, prefixes: Sequence[str]) -> None:
        """Do nothing: no tensor exists before it is asked for."""
