"""The `millrace` command."""

import os
import signal
import sys
from collections.abc import Sequence

from shared.errors import CheckpointError, ConfigError

USAGE = """usage: millrace serve (--model DIR | --demo) [flags]

  serve    run Redis and the four services on this machine; `millrace serve --help` lists the flags
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 when it was asked for something that cannot work."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] != "serve":
        print(f"millrace: error: no such command: {words[0]}\n{USAGE}", end="", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the event loop listens, as Ctrl-C
    try:
        return _serve(words[1:])
    except (ConfigError, CheckpointError) as error:
        print(f"millrace serve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _serve(words: Sequence[str]) -> int:
    from cli.flags import parse

    launch = parse(words, os.environ)  # before the second import, which takes a second: a mistyped flag is told at once
    from cli.serve import serve

    return serve(launch, os.environ)
