"""Report of what happens once for each kind of launch and takes far longer than the launch: a kernel is compiled or
loaded, a library makes a plan. All of it should have happened before the engine takes requests."""

import sys
from collections.abc import Callable
from typing import Any

Report = Callable[[str], None]

_report: Report | None = None


def report_first_uses(report: Report | None) -> None:
    """Call `report` with the name of each kernel or plan whose first use in this process is from now on."""
    global _report
    _report = report
    if "triton" in sys.modules:
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = _note_compiled


def note_first_use(what: str) -> None:
    """Report a first use, if anyone asked for it."""
    if _report is not None:
        _report(what)


def _note_compiled(*, fn: Any, **_: Any) -> None:
    """Note a kernel: Triton calls this when it has compiled one, or has found it on disk."""
    note_first_use(str(fn.name))
