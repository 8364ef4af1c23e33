"""Hints on how Millrace is installed, where something of it is missing. Imports nothing that could be missing, too."""

import sys
from importlib.machinery import PathFinder


def how_to_install(extra: str = "cli") -> str:
    """Return what to run in the source's directory for the commands that need `extra`."""
    pip = f"`pip install --constraint constraints.txt --editable '.[{extra}]'`"
    return f"run {'`make serve`, or ' if extra == 'cli' else ''}{pip}, in the source's directory"


def services_are_found() -> bool:
    """Return True if the services' processes, which do not search the working directory, will find their code."""
    searched = sys.path if sys.flags.safe_path else sys.path[1:]
    return PathFinder.find_spec("services", searched) is not None
