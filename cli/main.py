"""Entry point of the `millrace` command, and of `python -m cli.main`."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from shared.errors import CheckpointError, ConfigError

USAGE = """usage: millrace serve (--model DIR | --demo) [flags]
       millrace check DIR [--json]
       millrace top | status | autoscale [flags]
       millrace keys new | hash | usage [flags]
       millrace quarantine list | show | retry | drop [entries]
       millrace --version

  serve      run Redis and the four services on this machine
  check      say what a model directory would be served as, from headers only; the exit status says whether it will be
  top        watch a running pipeline: stages, replicas, streams, Redis
  status     the same once, as text or JSON; the exit status says whether all is well
  keys       make API keys for a key file, and see what each has used
  quarantine look at requests that crashed replica after replica, run them again or drop them
  autoscale  scale a deployment on Kubernetes by the work that waits in it

`millrace COMMAND --help` lists the flags.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 2 if it cannot work as asked."""
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
    except BrokenPipeError:  # the reader of our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


# Each imports what it needs when called: a mistyped flag is reported at once, and no command needs another's extra.


def _serve(words: Sequence[str]) -> int:
    from cli.flags import parse

    launch = parse(words, os.environ)
    from cli.serve import serve

    return serve(launch, os.environ)


def _check(words: Sequence[str]) -> int:
    from cli.check import main

    return main(words)


def _version(words: Sequence[str]) -> int:
    from shared.version import millrace_version

    if words:
        raise ConfigError(f"{words[0]}: --version takes no arguments")
    print(f"millrace {millrace_version()}")
    return 0


def _status(words: Sequence[str]) -> int:
    from cli.status import main

    return main(words, os.environ)


def _quarantine(words: Sequence[str]) -> int:
    from cli.quarantine import main

    return main(words, os.environ)


def _keys(words: Sequence[str]) -> int:
    from cli.keys import main

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
    "keys": _keys,
    "quarantine": _quarantine,
    "autoscale": _autoscale,
    "--version": _version,
}

if __name__ == "__main__":
    sys.exit(main())
