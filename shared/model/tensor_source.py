"""Interface of weights to the loaders of the engine and of the vision tower."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shared.model.stored_integers import StoredIntegers


class TensorSource(Protocol):
    """Weights by their original names (docs/checkpoint.md)."""

    def get(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return one tensor.

        Raises:
            CheckpointError: it is missing, has another shape, or is not of floating point.
        """

    def integers(self, name: str, shape: tuple[int, int], device: torch.device) -> StoredIntegers | None:
        """Return a weight that is stored quantised, on `device`; None if it is not.

        Raises:
            CheckpointError: it has another shape, or is not quantised in a way that is read.
        """

    def has(self, name: str) -> bool:
        """Return True if there is a tensor of this name."""

    def check_all_used(self, prefixes: Sequence[str]) -> None:
        """Check that all tensors below `prefixes` have been read.

        Raises:
            CheckpointError: one was not.
        """
