"""Limit on the files that a process may have open, connections among them."""

import resource
import sys

_MACOS_FILES = 10_240  # OPEN_MAX: its setrlimit refuses more, although the hard limit is "unlimited"


def raise_file_limit() -> None:
    """Raise the limit on open files as far as this process may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, _MACOS_FILES) if sys.platform == "darwin" else hard
    if soft < most or most == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
