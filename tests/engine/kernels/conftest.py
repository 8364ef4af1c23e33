"""One thread, one seed, and, for tests of the torch operations, NaN in every tensor allocated without filling it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_allocations(seeded: None) -> Iterator[None]:
    """Not for a GPU: there, deterministic mode refuses some operations."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
