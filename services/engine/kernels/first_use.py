"""Report of what happens once for each kind of launch and takes far longer than the launch: a kernel is compiled or
loaded, a library plans its own. All of it should have happened before the engine takes requests."""

import sys
from collections.abc import Callable
from typing import Any

Report = Callable[[str], None]

_reports: list[Report] = []


def note_first_use(what: str) -> None:
    """Tell whoever asked for it that `what` is used for the first time in this process."""
    for report in _reports:
        report(what)


def report_first_uses(report: Report) -> None:
    """Call `report` with the name of each kernel whose first use is from now on, if there are kernels at all."""
    _reports.append(report)
    if "triton" in sys.modules:
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = _compiled


def _compiled(*, fn: Any, **_: Any) -> None:
    note_first_use(str(fn.name))
