"""How many seeded requests get another text in company than alone, with the fastest operations and with batch-invariant
ones, at the full model's size.

    python -m benchmarks.same_text [--quantization wint4] [--output FILE.json]

Requests of several lengths run one by one, then together with more and more others, whose prompts are computed in the
same steps. Random weights make hardly any choice a clear one, so nearly every text turns where sums do. Needs a CUDA
device of 80 GB and some three minutes; asserts nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import Bench
from services.engine.loop.mailbox import Mailbox
from services.engine.loop.step_output import StepOutput
from shared.messages import Sampling

LENGTHS = (17, 100, 333, 700, 1024, 1500, 2600, 5000)
GENERATED = 96
COMPANY = (0, 1, 8, 60, 200)  # others, each of PROMPT tokens
PROMPT = 300


class Texts:
    """Sink that keeps every request's tokens, and ends the run when all requests have ended."""

    def __init__(self, mailbox: Mailbox, requests: int) -> None:
        self._mailbox, self._left = mailbox, requests
        self.tokens: dict[str, list[int]] = {}

    def __call__(self, output: StepOutput) -> None:
        for message in output.messages().values():
            for run in message.runs:
                self.tokens.setdefault(run.request_id, []).extend(run.tokens)
        self._left -= len(output.ended)
        if self._left == 0:
            self._mailbox.close()


def answers(bench: Bench, wanted: range, others: int) -> list[list[int]]:
    """Return the tokens of the requests numbered `wanted`, computed beside so many others."""
    company = [bench.sequence(1000 + index, PROMPT, GENERATED) for index in range(others)]
    asked = [bench.sequence(index, LENGTHS[index], GENERATED) for index in wanted]
    mixed = company[: others // 2] + asked + company[others // 2 :]
    mailbox = Mailbox()
    texts = Texts(mailbox, len(mixed))
    bench.drive(mixed, mailbox, texts)
    return [texts.tokens[sequence.request_id] for sequence in asked]


def turned(bench: Bench) -> dict[str, int]:
    """Return, by the number of others, how many of the texts are not those of the requests alone."""
    alone = [answers(bench, range(index, index + 1), 0)[0] for index in range(len(LENGTHS))]
    counts = {}
    for others in COMPANY:
        found = answers(bench, range(len(LENGTHS)), others)
        counts[str(others + len(LENGTHS))] = sum(a != b for a, b in zip(alone, found, strict=True))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="wint4,none", help="%(default)s; none is bf16")
    parser.add_argument("--output", type=Path, help="the JSON file")
    args = parser.parse_args()
    sampling = Sampling(seed=7, temperature=1.0, ignore_eos=True)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "texts": len(LENGTHS)}
    for quantization in args.quantization.split(","):
        for invariant in (False, True):
            torch.cuda.empty_cache()
            bench = Bench(quantization, 8192, sampling, batch_invariant=invariant)
            key = f"{'bf16' if quantization == 'none' else quantization} {'invariant' if invariant else 'fast'}"
            result[key] = turned(bench)
            print(key, json.dumps(result[key]), flush=True)
            del bench
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
