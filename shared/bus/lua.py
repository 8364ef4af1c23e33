"""Loader of the Lua scripts that run inside Redis: one file per script, with KEYS and ARGV in its header.

A header line `-- requires: NAME` puts the script NAME before it: one from the same folder, else one of `SCRIPTS`.
"""

import re
from pathlib import Path

from redis.asyncio import Redis

SCRIPTS = Path(__file__).with_name("scripts")

_REQUIRES = re.compile(r"^-- requires: (\w+)$", re.MULTILINE)
_READ: dict[tuple[str, Path], str] = {}  # files do not change


def read_script(name: str, folder: Path = SCRIPTS) -> str:
    """Return the source of a script, with the scripts that it requires before it."""
    if (name, folder) not in _READ:
        path = folder / f"{name}.lua"
        source = (path if path.exists() else SCRIPTS / f"{name}.lua").read_text(encoding="utf-8")
        required = [read_script(each, folder) for each in _REQUIRES.findall(source)]
        _READ[name, folder] = "".join(required) + source
    return _READ[name, folder]


async def load_scripts(redis: Redis) -> None:
    """Load into Redis what this process has read, so that no first request waits for it: a script that Redis does not
    know is refused, sent, compiled and called again. After a restart of Redis it is so."""
    async with redis.pipeline(transaction=False) as pipe:
        for source in _READ.values():
            pipe.script_load(source)
        await pipe.execute()
