"""A quicker interpreter, where Triton's kernels are interpreted."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import pytest


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
