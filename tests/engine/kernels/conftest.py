"""One thread, one seed, a quick interpreter, and, for tests of the torch operations, NaN in every tensor allocated
without filling it."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def patched_language() -> Iterator[None]:
    """The interpreter puts its own functions into Triton's language whenever a kernel calls a function, tl.sum or
    tl.cdiv too, which takes longer than most of them run. Once is enough."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    # Not before: Triton asks whether to interpret when it is imported.
    import triton.language as tl
    from triton.runtime import interpreter

    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with patch.object(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope()):
        yield
    scope.restore()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_allocations(seeded: None) -> Iterator[None]:
    """Not for a GPU: there, deterministic mode refuses some operations."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
