"""Entry point of the `millrace` command, and of `python -m cli.main`."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from cli import signals
from cli.installation import how_to_install
from cli.output import silence

USAGE = """usage: millrace serve (--model DIR | --demo) [flags]
       millrace check DIR [--json]
       millrace plan --model DIR (--card NAME | --memory SIZE | --table) [flags]
       millrace quantize --model DIR --output DIR --quantization wint4|wint8
       millrace bench serve --url URL --model NAME [flags]
       millrace top | status | autoscale [flags]
       millrace keys new | hash | usage [flags]
       millrace quarantine list | show | retry | drop [entries]
       millrace --version

  serve      run Redis and the four services on this machine
  check      say what a model directory would be served as, from headers only; the exit status says whether it will be
  plan       say what a deployment would hold on a card, and how many cards it needs, without one
  quantize   write a model directory with quantised weights, from which a start reads less
  bench      measure a server, this one or another's: tokens a second, times to the first and between tokens
  top        watch a running pipeline: stages, replicas, streams, Redis
  status     the same once, as text or JSON; the exit status says whether all is well
  keys       make API keys for a key file, and see what each has used
  quarantine look at requests that crashed replica after replica, run them again or drop them
  autoscale  scale a deployment on Kubernetes by the work that waits in it

`millrace COMMAND --help` lists the flags.
"""


OUR_PACKAGES = ("cli", "services", "shared")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 2 if it cannot work as asked."""
    signals.end_at_once()
    try:
        from shared.errors import CheckpointError, ConfigError
        from shared.visible import visible_lines
    except ModuleNotFoundError as error:  # of a library: this is a plain source tree
        sys.exit(f"millrace: error: {error.name} is not installed: {how_to_install()}")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"millrace: error: no such command: {words[0]}\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        status = COMMANDS[words[0]](words[1:])
        if sys.stdout is not None:  # as it is where it was closed before we were started
            sys.stdout.flush()
        return status
    except (ConfigError, CheckpointError) as error:
        print(f"millrace {words[0]}: error: {visible_lines(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OUR_PACKAGES:
            raise
        needed = how_to_install("autoscaler" if words[0] == "autoscale" else "cli")
        print(f"millrace {words[0]}: error: {error.name} is not installed: {needed}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has ended
        silence(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or "what it writes"
        print(
            f"millrace {words[0]}: error: the disk has no room for {place}: make room, or let temporary files go "
            "elsewhere (TMPDIR=/another/disk)",
            file=sys.stderr,
        )
        return 2


def _run(command: Callable[..., int], *arguments: object) -> int:
    """Run a command whose modules are there."""
    signals.end_by_exception()
    return command(*arguments)


# Each imports what it needs when called: a mistyped flag is reported at once, and no command needs another's extra.


def _serve(words: Sequence[str]) -> int:
    from cli.flags import parse

    launch = parse(words, os.environ)
    from cli.serve import serve

    return _run(serve, launch, os.environ)


def _check(words: Sequence[str]) -> int:
    from cli.check import main

    return _run(main, words)


def _plan(words: Sequence[str]) -> int:
    from cli.plan import main

    return _run(main, words)


def _quantize(words: Sequence[str]) -> int:
    from cli.quantize import main

    return _run(main, words)


def _bench(words: Sequence[str]) -> int:
    from cli.bench.command import main
    from shared.errors import ConfigError

    if words[:1] != ["serve"]:
        raise ConfigError("say what to measure: millrace bench serve --url URL --model NAME")
    return _run(main, words[1:], os.environ)


def _version(words: Sequence[str]) -> int:
    from shared.errors import ConfigError
    from shared.version import MILLRACE_VERSION

    if words:
        raise ConfigError(f"{words[0]}: --version takes no arguments")
    print(f"millrace {MILLRACE_VERSION}")
    return 0


def _status(words: Sequence[str]) -> int:
    from cli.status import main

    return _run(main, words, os.environ)


def _quarantine(words: Sequence[str]) -> int:
    from cli.quarantine import main

    return _run(main, words, os.environ)


def _keys(words: Sequence[str]) -> int:
    from cli.keys import main

    return _run(main, words, os.environ)


def _top(words: Sequence[str]) -> int:
    from cli.top import main

    return _run(main, words, os.environ)


def _autoscale(words: Sequence[str]) -> int:
    from cli.autoscaler.__main__ import main

    return _run(main, words, os.environ)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "check": _check,
    "plan": _plan,
    "quantize": _quantize,
    "bench": _bench,
    "top": _top,
    "status": _status,
    "keys": _keys,
    "quarantine": _quarantine,
    "autoscale": _autoscale,
    "--version": _version,
}

if __name__ == "__main__":
    sys.exit(main())
