"""A GPU that engine and encoder share, as served: text, pictures, and both at once.

    python -m benchmarks.shared_card --model DIR [--ways NAME ...] [--piece-ms MS] [--decode-pieces N]
        [--mps-percent P] [--seconds S] [--output FILE.json] [-- FLAG ...]

Starts `millrace serve` once for each way of sharing, with the flags behind `--`, and measures it over HTTP as
`millrace bench serve` does: closed loops of clients, text of 1,024 random tokens with 256 of answer, and new pictures
with 32. Figures are of what came after the first WARM_S, when clients do not all ask at once any more; what is open at
the end is given up, and a case begins when nothing is left of the one before. `--load-format dummy` among the flags
needs no weights. Needs a GPU; asserts nothing. With --output the figures are kept as JSON:

  ways.<name>.<case>.text, .pictures   the figures of `millrace bench serve`, and requests answered a second
  ways.<name>.<case>.counters          growth of some metrics meanwhile
  ways.<name>.settings                 piece_ms, decode_pieces and mps_percent
  constants                            what the code has and no setting changes: engine_share (BESIDE_ENCODER),
                                       prefill_pieces and batch_patches (ENOUGH)
  device, flags, date

The ways:

  whole    passes are sent whole, and the driver shares the GPU (MILLRACE_SHARED_CARD_MS=0)
  pieces   of --piece-ms, with --decode-pieces; as it is by default without these
  mps      the same under CUDA MPS; the encoder may use --mps-percent of the multiprocessors
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from cli.bench.command import run
from cli.bench.figures import figures
from cli.bench.load import Answer, Load, Part, shares
from services.engine.schedule.prefill_budget import BESIDE_ENCODER
from services.mm_encoder.settings import MmEncoderSettings
from services.mm_encoder.vision.batcher import ENOUGH
from services.mm_encoder.vision.pace import PREFILL_PIECES

PORT, METRICS_PORT = 8180, 8181
READY = b"; Ctrl-C stops"
PATIENCE_S = 240.0  # of a start
LARGE, SMALL = (1920, 1080), (448, 448)
# By case: text clients, picture clients, the pictures' size, whether these were seen, and a share of --seconds.
USUAL: dict[str, tuple[int, int, tuple[int, int], bool, float]] = {
    "text": (16, 0, LARGE, False, 1.0),
    "1080p": (0, 8, LARGE, False, 1.0),
    "text and 1080p": (16, 8, LARGE, False, 1.5),
    "one 1080p": (0, 1, LARGE, False, 0.5),
    "one 1080p, seen": (0, 1, LARGE, True, 0.3),
    "448": (0, 32, SMALL, False, 0.7),
    "text and 448": (16, 32, SMALL, False, 1.0),
}
CASES = USUAL | {
    "one 448": (0, 1, SMALL, False, 0.5),
    "16 of 1080p": (0, 16, LARGE, False, 1.0),
    "64 of 1080p": (0, 64, LARGE, False, 1.5),
    "16 of 448": (0, 16, SMALL, False, 0.7),
    "64 of 448": (0, 64, SMALL, False, 0.7),
}
WARM_S = 1.5
SETTLED_S, SETTLING_S = 0.4, 20.0  # without a change of a counter; the longest wait for that
COUNTED = (
    "millrace_mm_",
    "millrace_hop_seconds",
    "millrace_time_to_first_token",
    "millrace_request_",
    "millrace_engine_step_seconds",
    "millrace_inter_token",
    "millrace_kernel_first_uses",
)

CONSTANTS = {"engine_share": BESIDE_ENCODER, "prefill_pieces": PREFILL_PIECES, "batch_patches": ENOUGH}


class Sharing(NamedTuple):
    """Settings of an encoder that shares the GPU."""

    piece_ms: float
    decode_pieces: int
    mps_percent: int

    def of(self, way: str) -> "Sharing":
        """Return the same, as far as a way has it."""
        if way == "whole":
            return Sharing(0.0, 0, 0)
        return self if way == "mps" else self._replace(mps_percent=0)

    def environment(self) -> dict[str, str]:
        """Return what `millrace serve` reads."""
        return {
            "MILLRACE_SHARED_CARD_MS": str(self.piece_ms),
            "MILLRACE_SHARED_CARD_DECODE_PIECES": str(self.decode_pieces),
            "MILLRACE_MPS_PERCENT": str(self.mps_percent),
        }


@contextmanager
def served(flags: Sequence[str], environ: Mapping[str, str], log: Path) -> Iterator[float]:
    """Run `millrace serve`; yield the seconds it took to be ready."""
    command = [sys.executable, "-P", "-m", "cli.main", "serve", "--host", "127.0.0.1", "--port", str(PORT)]
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *flags], env=dict(environ), stdout=file, stderr=subprocess.STDOUT)
    try:
        while READY not in log.read_bytes():
            if process.poll() is not None or time.monotonic() - began > PATIENCE_S:
                raise SystemExit(f"it did not become ready:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield time.monotonic() - began
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def counters() -> dict[str, float]:
    """Return the service's metrics that are of interest here."""
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics") as response:
        lines = response.read().decode().splitlines()
    counted = (line for line in lines if line.startswith(COUNTED) and "_created" not in line and "_bucket" not in line)
    rows = (line.rsplit(" ", 1) for line in counted)
    return {name: float(value) for name, value in rows}


def settle() -> None:
    """Wait until the service has done all that it was asked for, given up or not."""
    until, before = time.monotonic() + SETTLING_S, counters()
    while time.monotonic() < until:
        time.sleep(SETTLED_S)
        if (now := counters()) == before:
            return
        before = now


def measure(case: str, seconds: float, last_id: int) -> dict[str, Any]:
    """Measure one case; return its figures."""
    text, pictures, size, seen, share = CASES[case]
    common = Load(
        url=f"http://127.0.0.1:{PORT}/v1/completions",
        model="m",
        key="",
        prompt=(1024, 1024),
        output=256,
        ids=(1000, last_id),
        seconds=WARM_S + seconds * share,
    )
    chats = msgspec.structs.replace(
        common, url=common.url.replace("completions", "chat/completions"), output=32, picture=size, seen=seen
    )
    loads = {
        "text": shares(msgspec.structs.replace(common, clients=text), 2) if text else [],
        "pictures": shares(msgspec.structs.replace(chats, clients=pictures), 2) if pictures else [],
    }
    settle()
    before = counters()
    parts, begin = run([load for some in loads.values() for load in some])
    made: dict[str, Any] = {"counters": {name: now - before.get(name, 0) for name, now in counters().items()}}
    for what, some in loads.items():
        if some:
            made[what] = steady(f"{case}: {what}", parts[: len(some)], begin + WARM_S, seconds * share)
            parts = parts[len(some) :]
    return made


def steady(name: str, parts: Sequence[Part], since: float, seconds: float) -> dict[str, Any]:
    """Return the figures of a load for `seconds` from a time on.

    Tokens and gaps are of what was read by then, first tokens of requests whose first one was.
    """
    late = [Part([cut for answer in part.answers if (cut := _cut(answer, since))], part.cpu) for part in parts]
    begun = [Part([a for a in part.answers if not a.events or a.events[0] >= since], part.cpu) for part in parts]
    found, first = figures(name, late, since, seconds), figures(name, begun, since, seconds)
    found = msgspec.structs.replace(found, ttft_p50=first.ttft_p50, ttft_p99=first.ttft_p99)
    return {**msgspec.to_builtins(found), "requests_s": found.answered / seconds}


def _cut(answer: Answer, since: float) -> Answer | None:
    """Return what was read of an answer from a time on; None: it had ended by then."""
    if answer.ended is not None and answer.ended < since:
        return None
    events = [at for at in answer.events if at >= since]
    if answer.tokens is None or not answer.events:
        return msgspec.structs.replace(answer, events=events)
    return msgspec.structs.replace(answer, events=events, tokens=answer.tokens * len(events) // len(answer.events))


def line(way: str, case: str, what: str, row: Mapping[str, Any]) -> str:
    return (
        f"{way:7}{case:18}{what:9}{row['output_tok_s']:7,.0f} tok/s {row['requests_s']:6.1f} requests/s  first token "
        f"{row['ttft_p50']:7.1f} {row['ttft_p99']:7.1f}  gap {row['gap_p50']:5.1f} {row['gap_p99']:6.1f} "
        f"{row['gap_p999']:6.1f}  failed {row['failed']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--ways", nargs="+", choices=("whole", "pieces", "mps"), default=["whole", "pieces"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(USUAL), metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--seconds", type=float, default=10.0, help="of a case of the usual length (10)")
    parser.add_argument("--last-id", type=int, default=100_000, help="that prompts are drawn from (100000)")
    usual = MmEncoderSettings(redis_url="", model="")
    parser.add_argument("--piece-ms", type=float, default=usual.shared_card_ms, help="of a pass sent at once (2)")
    parser.add_argument(
        "--decode-pieces",
        type=int,
        default=usual.shared_card_decode_pieces,
        help="the most beside a decode step; 0: any number (0)",
    )
    parser.add_argument("--mps-percent", type=int, default=60, help="of the multiprocessors, in the way mps (60)")
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="directory of the servers' logs")
    parser.add_argument("flags", nargs="*", help="of `millrace serve`, behind --")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result: dict[str, Any] = {"ways": {}, "device": device, "flags": args.flags, "constants": CONSTANTS}
    result["date"] = datetime.now(UTC).date().isoformat()
    for way in args.ways:
        with ExitStack() as stack:
            sharing = Sharing(args.piece_ms, args.decode_pieces, args.mps_percent).of(way)
            environ = {**os.environ, **sharing.environment()}
            flags = [
                "--model",
                args.model,
                "--served-model-name",
                "m",
                "--metrics-port",
                str(METRICS_PORT),
                *args.flags,
            ]
            ready = stack.enter_context(served(flags, environ, args.logs / f"serve-{way}.log"))
            print(f"{way}: ready after {ready:.1f} s", flush=True)
            figures_of: dict[str, Any] = {"ready_s": ready, "settings": sharing._asdict()}
            result["ways"][way] = figures_of
            for case in args.cases:
                figures_of[case] = made = measure(case, args.seconds, args.last_id)
                for what in ("text", "pictures"):
                    if what in made:
                        print(line(way, case, what, made[what]), flush=True)
                if args.output is not None:
                    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
