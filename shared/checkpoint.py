"""Reads sharded safetensors by the hub's names, whatever naming the files use. The only part of `shared` with torch.

Accepted on disk: the hub's original names with or without the `model.` prefix on the vision tower, and transformers'
own (fused experts, transposed gates). Asked for: the original names of docs/checkpoint.md.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch


class Checkpoint:
    """An opened model directory. Tensors are read one at a time, memory-mapped; nothing is unpickled."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            CheckpointError: no safetensors, an index that names absent files, or the same tensor twice.
        """
        raise NotImplementedError

    def get(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """One tensor by its original name, on the CPU, in its stored dtype.

        Raises:
            CheckpointError: it is missing or has another shape.
        """
        raise NotImplementedError

    def has(self, name: str) -> bool:
        raise NotImplementedError

    def check_all_used(self, prefixes: Sequence[str]) -> None:
        """
        Raises:
            CheckpointError: a tensor whose original name starts with one of `prefixes` was never asked for.
        """
        raise NotImplementedError

    def names(self) -> Iterator[str]:
        """Original names of all tensors."""
        raise NotImplementedError
