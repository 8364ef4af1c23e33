"""The `millrace` command."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from shared.errors import CheckpointError, ConfigError

USAGE = """usage: millrace serve (--model DIR | --demo) [flags]
       millrace check DIR [--json]
       millrace top | status | autoscale [flags]
       millrace quarantine list | show | retry | drop [entries]

  serve      run Redis and the four services on this machine
  check      say what a model directory would be served as, from headers only; the exit status says whether it will be
  top        watch a running pipeline: stages, replicas, streams, Redis
  status     the same once, as text or JSON; the exit status says whether all is well
  quarantine look at requests that ended replica after replica, run them again or drop them
  autoscale  scale a deployment on Kubernetes by the work that waits in it

`millrace COMMAND --help` lists the flags.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 when it was asked for something that cannot work."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"millrace: error: no such command: {words[0]}\n{USAGE}", end="", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the event loop listens, as Ctrl-C
    try:
        status = COMMANDS[words[0]](words[1:])
        sys.stdout.flush()
        return status
    except (ConfigError, CheckpointError) as error:
        print(f"millrace {words[0]}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


# Each imports what it needs when it is called: a mistyped flag is told at once, and no command needs another's extra.


def _serve(words: Sequence[str]) -> int:
    from cli.flags import parse

    launch = parse(words, os.environ)
    from cli.serve import serve

    return serve(launch, os.environ)


def _check(words: Sequence[str]) -> int:
    from cli.check import main

    return main(words)


def _status(words: Sequence[str]) -> int:
    from cli.status import main

    return main(words, os.environ)


def _quarantine(words: Sequence[str]) -> int:
    from cli.quarantine import main

    return main(words, os.environ)


def _top(words: Sequence[str]) -> int:
    from cli.top import main

    return main(words, os.environ)


def _autoscale(words: Sequence[str]) -> int:
    try:
        from cli.autoscaler.__main__ import main
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'millrace[autoscaler]'") from error
    return main(words, os.environ)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "check": _check,
    "top": _top,
    "status": _status,
    "quarantine": _quarantine,
    "autoscale": _autoscale,
}
