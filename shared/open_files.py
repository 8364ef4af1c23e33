"""Limit of the kernel on the files that a process has open, connections among them."""

import resource


def raise_file_limit() -> None:
    """Raise the limit on open files as far as this process may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
