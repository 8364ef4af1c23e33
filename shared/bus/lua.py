"""Loader of the Lua scripts that run inside Redis: one file per script, with KEYS and ARGV in its header.

A header line `-- requires: NAME` puts the script NAME before it: one from the same folder, else one of `SCRIPTS`.
"""

import re
from functools import cache
from pathlib import Path

SCRIPTS = Path(__file__).with_name("scripts")

_REQUIRES = re.compile(r"^-- requires: (\w+)$", re.MULTILINE)


@cache
def read_script(name: str, folder: Path = SCRIPTS) -> str:
    """Return the source of a script, with the scripts that it requires before it."""
    path = folder / f"{name}.lua"
    source = (path if path.exists() else SCRIPTS / f"{name}.lua").read_text(encoding="utf-8")
    return "".join(read_script(required, folder) for required in _REQUIRES.findall(source)) + source
