"""Command `millrace bench serve`: measure any server of OpenAI's API as its users meet it, over HTTP.

Prompts are token ids drawn at random, so they have their length at every server and are in nobody's cache; or each is
a question about a picture. Exit status: 1 if a request failed.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from cli.bench.figures import Figures, First, figures, first_of, first_table, table
from cli.bench.guesses import Counters, read
from cli.bench.http_stream import host_of
from cli.bench.load import Load, Part, Range, poisson, shares
from cli.connection import Parser
from cli.output import write
from shared.errors import ConfigError
from shared.tether import tethered

KEY = "OPENAI_API_KEY"  # as other clients have it
LOOPS = 4  # requests of each client, unless told
TIMES = 10  # requests of each length of --first
FIRST_OUTPUT = 16  # tokens of their answers
SHOWN_ERRORS = 3
LEAD_S = 0.05  # from the word to begin to the beginning
CLIENT = [sys.executable, "-P", "-m", "cli.bench.client"]


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command and return the exit status.

    Raises:
        ConfigError: a flag is wrong.
    """
    given = _parser().parse_args(words)
    if given.seen and not given.picture:
        raise ConfigError("--seen: say of which --picture")
    if given.first and given.metrics:
        raise ConfigError("--metrics: --first measures requests one by one, and tells of no guesses")
    if given.first and given.picture:
        raise ConfigError("--picture: --first is of prompts of ids")
    if given.json and not _can_be_written(given.json):
        raise ConfigError(f"--json: {given.json} cannot be written")
    key = environ.get(KEY, "")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY} has a character that is in no key: a line's end, or one that is not ASCII")
    base = Load(
        url=_endpoint(given.url, "chat/completions" if given.picture else "completions"),
        model=given.model,
        key=key,
        prompt=given.input,
        output=given.output,
        ids=given.ids,
        picture=given.picture,
        seen=given.seen,
    )
    if given.metrics:
        read(given.metrics)  # of a wrong one somebody hears before the load
    loads = _loads(base, given)
    firsts: list[First] = []
    rows: list[Figures] = []
    try:
        for length in given.first:
            firsts.append(_first(base, length))  # noqa: PERF401  # one by one, as any may be the last
        for name, load in loads:
            rows.append(_run(name, load, given.processes, given.metrics))
    finally:  # what was measured before a Ctrl-C or a failure took long, too
        if firsts or rows:
            _show(firsts, rows, " ".join(words), given.json)
    return 1 if _errors(firsts, rows) else 0


def _errors(firsts: list[First], rows: list[Figures]) -> Counter[str]:
    return sum(map(Counter, [*(row.errors for row in firsts), *(row.errors for row in rows)]), Counter())


def _can_be_written(file: Path) -> bool:
    if os.access(file, os.F_OK):  # as /dev/stdout, in a directory that is not ours
        return os.access(file, os.W_OK) and not file.is_dir()
    return os.access(file.absolute().parent, os.W_OK)


def _show(firsts: list[First], rows: list[Figures], command: str, file: Path | None) -> None:
    """Print the figures, and write them to `file`."""
    print(first_table(firsts) if firsts else table(rows))
    for error, count in _errors(firsts, rows).most_common(SHOWN_ERRORS):
        print(f"failed ({count}): {error}", file=sys.stderr)
    if file:
        found = {"first": firsts} if firsts else {"loads": rows}
        report = {"date": datetime.now(UTC).date().isoformat(), "command": command, **found}
        file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def _parser() -> Parser:
    parser = Parser(
        prog="millrace bench serve",
        description=f"Measure a server of OpenAI's API. Its key, if it asks for one, is in {KEY}.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", required=True, help="of the server: http://127.0.0.1:8180, with /v1 or without")
    parser.add_argument("--model", required=True, metavar="NAME", help="as the server knows it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--clients", type=_counts, default=(), metavar="N,N,...", help="closed loops, each of so many clients at once"
    )
    what.add_argument("--rate", type=_positive, metavar="N", help="requests a second, at times of a Poisson process")
    what.add_argument(
        "--first",
        type=_counts,
        default=(),
        metavar="N,N,...",
        help=f"{TIMES} requests of each of these lengths, one by one: the first of a fresh server against the last",
    )
    parser.add_argument(
        "--input", type=_range, default=(1024, 1024), metavar="N[-N]", help="tokens of a prompt, evenly spread (1024)"
    )
    parser.add_argument("--output", type=_count, default=256, metavar="N", help="tokens of an answer (%(default)s)")
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--seconds", type=_positive, metavar="S", help="give up what is open then (with --rate: 30)")
    until.add_argument(
        "--requests", type=_count, metavar="N", help=f"of a closed loop, read to their end ({LOOPS} a client)"
    )
    parser.add_argument(
        "--ids",
        type=_range,
        default=(1000, 100_000),
        metavar="N-N",
        help="token ids that prompts are drawn from (1000-100000; that of `make serve` has 100-1999)",
    )
    parser.add_argument(
        "--picture", type=_size, metavar="WxH", help="ask about a new picture of this size in place of a prompt of ids"
    )
    parser.add_argument("--seen", action="store_true", help="with --picture: about one that the server has seen before")
    parser.add_argument(
        "--metrics",
        metavar="URL",
        help="of the server's metrics: http://127.0.0.1:8181/metrics; tells how many tokens were guessed",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of times and lengths (%(default)s)")
    parser.add_argument(
        "--processes",
        type=_count,
        default=min(4, max(1, (os.cpu_count() or 1) // 2)),
        metavar="N",
        help="client processes (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go as JSON")
    return parser


def _loads(base: Load, given: argparse.Namespace) -> list[tuple[str, Load]]:
    replace = msgspec.structs.replace
    if given.rate:
        if given.requests:
            raise ConfigError("--requests: with --rate the time is what ends a run; say --seconds")
        seconds = given.seconds or 30.0
        arrivals = tuple(poisson(given.rate, seconds, base.prompt, given.seed))
        return [(f"{given.rate:g}/s", replace(base, arrivals=arrivals, seconds=seconds))]
    loads = []
    for clients in given.clients:
        requests = None if given.seconds else given.requests or LOOPS * clients
        loads.append((f"{clients}", replace(base, clients=clients, requests=requests, seconds=given.seconds)))
    return loads


def _run(name: str, load: Load, processes: int, metrics: str | None) -> Figures:
    before = _counters(name, metrics)
    parts, begin = run(shares(load, processes))
    made = figures(name, parts, begin, load.seconds)
    if before is not None and (after := _counters(name, metrics)) is not None:
        right, share = after.since(before)
        made = msgspec.structs.replace(made, guesses_right=right, tokens_guessed=share)
    write(sys.stderr, f"{name}: {made.output_tok_s:,.0f} tok/s, client {made.client_cpu:.2f} of a core\n")
    return made


def _counters(name: str, metrics: str | None) -> Counters | None:
    """Return the server's counters, or None if nobody asks for them or they cannot be read any more."""
    try:
        return None if metrics is None else read(metrics)
    except ConfigError as error:  # which costs a figure, and not those that were measured
        write(sys.stderr, f"{name}: no figures of guesses: {error}\n")
        return None


def _first(base: Load, length: int) -> First:
    load = msgspec.structs.replace(
        base, prompt=(length, length), output=FIRST_OUTPUT, clients=1, requests=TIMES, seconds=None
    )
    (part,), _ = run([load])
    return first_of(length, part)


def run(loads: Sequence[Load]) -> tuple[list[Part], float]:
    """Run each load in a process of its own, all from the same moment on; return what they saw, and that moment.

    Raises:
        ConfigError: a process ended before it had said what it saw; the reason is on standard error.
    """
    with ExitStack() as stack:
        processes = []
        for load in loads:
            process = subprocess.Popen(
                tethered(CLIENT),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # so that Ctrl-C in a terminal reaches us alone, and we end them
            )
            stack.enter_context(process)
            stack.callback(process.kill)  # of one that has ended nothing
            processes.append(process)
            _tell(process, msgspec.json.encode(load))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        begin = time.monotonic() + LEAD_S
        for process in processes:
            _tell(process, repr(begin).encode())
        printed = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise ConfigError("a client process failed")
        return [msgspec.json.decode(text, type=Part) for text in printed], begin


def _tell(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(line + b"\n")
        process.stdin.flush()
    except BrokenPipeError:  # it has ended, which is found out when its answer is read
        return


def _endpoint(url: str, path: str) -> str:
    """Return the URL of an endpoint of a server."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url: {url} does not begin with http:// or https://")
    try:
        parts = urlsplit(url)
        right = parts.hostname and parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
    except ValueError as error:
        raise ConfigError(f"--url: {url} is not a URL: {error}") from None
    if not right or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"--url: {url} is not the URL of a server: http://HOST:PORT, or a path below it")
    zone = host_of(parts).partition("%")[2]
    if zone and zone not in (word for index, name in socket.if_nameindex() for word in (name, str(index))):
        raise ConfigError(f"--url: {url} names the network interface {zone}, which this machine does not have")
    return url.rstrip("/").removesuffix("/v1") + f"/v1/{path}"


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(word) for word in text.split(","))


def _range(text: str) -> Range:
    low, _, high = text.partition("-")
    found = _count(low), _count(high or low)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range from a number to one that is no less")
    return found


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return _count(width), _count(height)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
