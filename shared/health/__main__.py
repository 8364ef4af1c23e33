"""`python -m shared.health SERVICE live|ready`: the health command of every image, for a container's probes.

It reads the environment of the service that it runs beside. Exit status 0: healthy; 1: not, with a line that says why;
2: wrong usage.
"""

import asyncio
import os
import sys

from shared.errors import ConfigError
from shared.health import Probe, look, probe_settings

UNWELL = 1
MISUSED = 2


def main(arguments: list[str]) -> int:
    """Probe a replica; return the exit status."""
    if len(arguments) != 2 or arguments[1] not in tuple(Probe):
        print("usage: python -m shared.health SERVICE live|ready", file=sys.stderr)
        return MISUSED
    service, probe = arguments[0], Probe(arguments[1])
    try:
        wrong = asyncio.run(look(probe_settings(os.environ), service, probe))
    except ConfigError as error:
        print(f"health: {error}", file=sys.stderr)
        return MISUSED
    if wrong is None:
        return 0
    print(f"{service}: {wrong}", file=sys.stderr)
    return UNWELL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
