"""Speculative decoding: tokens for the time against none, by kind of text and number of sequences.

    python -m benchmarks.speculation [--output FILE]
    python -m benchmarks.speculation --device cuda [--quantization wint4,none] [--output FILE]

The engine's loop without Redis, with and without guesses in turns. Asserts nothing.

On a CPU: the demo checkpoint, one thread, in seconds of computing, so that other work on the machine weighs little. The
model is too small to copy a page, so a grammar makes it write `copy` (a text of its prompt) and `table` (lines as of a
scanned list, which the prompt does not have); `json` follows a schema with what is likeliest; `free` are questions
about Millrace, answered at temperature 1 and on past their end. Five minutes on an idle machine.

On a GPU: random weights of the published size, which say what a script has (benchmarks/scripted_answers.py): `free` is
how a page of the documentation goes on, and `json` records that follow each other. In seconds from the first tokens to
the last. `drawn` are the model's own tokens, of two that are allowed: whether they are the same, which they must be
with --batch-invariant. Two minutes a format and 80 GB (bf16: 141). Packages as for benchmarks.structured.

  <kind>.<rows>.gain      least time without guesses over least time with them
  <kind>.<rows>.steps     steps with guesses over steps without
  <kind>.<rows>.right     share of guesses that were right; null: there were none
  <kind>.<rows>.same      whether all answers are the same tokens
  <kind>.<rows>.tokens    of all answers
  <kind>.<rows>.ms        a token of each sequence: without guesses, with them
  decode_ms.<rows>        of captured steps, as the engine has measured them at its start
  wait_ms.<rows>          that a step without guesses takes longer if each waits for the one before; a GPU's figures
                          have the format in front of all this
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from llguidance import LLMatcher
from prometheus_client import CollectorRegistry

from benchmarks.demo_model.prompt import Encoder
from benchmarks.demo_model.questions import questions
from benchmarks.demo_model.sample import Sample, user
from benchmarks.engine import Bench, numbers
from benchmarks.scripted_answers import DRAWN, Run, ScriptedBench, Sink
from benchmarks.structured import Report, environment
from services.engine.__main__ import load, speculation
from services.engine.device_defaults import CPU_TOKENS
from services.engine.loop.engine import Engine
from services.engine.loop.mailbox import Add, Mailbox
from services.engine.metrics import EngineMetrics
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.grammar_state import GrammarState
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import EngineFacts, Sequence, build
from services.engine.settings import EngineSettings, SpeculativeConfig
from shared.grammar import forms
from shared.grammar.compiler import GrammarCompiler
from shared.messages import Generate, Grammar, Output, Request, Sampling, pack_ids
from shared.metrics import value
from shared.model.config import load_model_config
from shared.model.tokenizer import Tokenizer

DEMO = Path("cli/demo_checkpoint")
ROWS = (1, 2, 4, 8)
READING = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "degrees": {"type": "integer", "maximum": 50}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
ROUNDS = {"cpu": 6, "cuda": 3}
LENGTH = 96  # tokens of an answer, at most
LONGER = 160  # the same of scripted answers, whose prompts' steps are not measured
SETTINGS = {"max_num_seqs": 32, "max_num_batched_tokens": 2048}
GUESSES = SpeculativeConfig(method="ngram", num_speculative_tokens=8)
COLOURS = ("red", "green", "blue", "black")

Format = Literal["none", "wint8", "wint4"]
Asked = tuple[str, str | None]  # a question, and the grammar of its answer


class Prompt(NamedTuple):
    ids: list[int]
    grammar: str | None  # of the answer
    matcher: LLMatcher | None  # at its beginning


def copy(rng: random.Random) -> Asked:
    passages = [part for part in Path("README.md").read_text(encoding="utf-8").split("\n\n") if 300 < len(part) < 600]
    text = rng.choice(passages)
    return f"Copy this text: {text}", forms.write(forms.choice([text]), thinking=False)


def table(rng: random.Random) -> Asked:
    lines = [f"| {rng.randrange(1000)} | {rng.choice(COLOURS)} | {rng.randrange(100)}.00 EUR |" for _ in range(12)]
    return "Write down the list.", forms.write(forms.choice(["\n".join(lines)]), thinking=False)


def records(rng: random.Random) -> Asked:
    schema = forms.json_schema({"type": "array", "items": READING, "minItems": 50})
    return f"Write {rng.randrange(100)} records of the weather as JSON.", forms.write(schema, thinking=False)


def free(rng: random.Random) -> Asked:
    [question] = questions(1, rng.randrange(1000), only="Millrace")
    return "".join(part for part in question.sample.messages[-1].parts if isinstance(part, str)), None


KINDS: dict[str, Callable[[random.Random], Asked]] = {"copy": copy, "table": table, "json": records, "free": free}


class Answering(Protocol):
    """A model that answers prompts of a kind, with guesses or without."""

    def prompts(self, kind: str, rows: int) -> list[Any]: ...

    def run(self, prompts: list[Any], guesses: bool) -> Run: ...


class DemoBench:
    """The engine's loop over the demo checkpoint."""

    def __init__(self) -> None:
        self._settings = EngineSettings(
            redis_url="unix:///unused", model=str(DEMO), max_model_len=1024, torch_threads=1, device="cpu",
            enable_prefix_caching=False, max_num_batched_tokens=CPU_TOKENS,
        )  # fmt: skip
        config, tokenizer = load_model_config(DEMO), Tokenizer.load(DEMO)
        self._facts = EngineFacts(config, 1024, think_close_id=3)
        self._encoder = Encoder.load(DEMO)
        self._compiler = GrammarCompiler(tokenizer, config.vocab_size, config.eos_ids)
        self._runner, self._blocks = load(self._settings, config, "cpu")

    def prompts(self, kind: str, rows: int) -> list[Prompt]:
        rng, made = random.Random(f"{kind} {rows}"), []
        for _ in range(rows):
            text, grammar = KINDS[kind](rng)
            encoded = self._encoder.encode(Sample(kind, text, user(text), "", "", thinking=False))
            matcher = None if grammar is None else self._compiler.compile(grammar)
            made.append(Prompt(encoded.ids[: encoded.answer_at].tolist(), grammar, matcher))
        return made

    def run(self, prompts: list[Prompt], guesses: bool) -> Run:
        settings, mailbox = self._settings, Mailbox()
        sink = Sink(mailbox, len(prompts))
        pool = BlockPool(self._blocks, caching=False)
        most, budget, block = settings.max_num_seqs, settings.max_num_batched_tokens, settings.block_size
        limits = Limits(most, budget, True, block, None, speculation(GUESSES if guesses else None, self._runner))
        scheduler, metrics = Scheduler(pool, limits), EngineMetrics(CollectorRegistry())
        for index, prompt in enumerate(prompts):
            mailbox.put(Add(self._sequence(index, prompt)))
        started = time.process_time()
        Engine(mailbox, scheduler, pool, self._runner, sink, metrics).run()
        return Run(time.process_time() - started, len(sink.stamps), sink.tokens, metrics)

    def _sequence(self, index: int, prompt: Prompt) -> Sequence:
        grammar = None if prompt.grammar is None else Grammar(prompt.grammar, "response_format")
        sampling = Sampling(seed=index, temperature=float(prompt.grammar is None), ignore_eos=True, grammar=grammar)
        request = Request(f"{index:016x}", "bench", 0, 0.0, sampling, Output(thinking=False))
        state = None if prompt.matcher is None else GrammarState(prompt.matcher.deep_copy())
        return build(Generate(request, pack_ids(prompt.ids), LENGTH, ()), 1, (), (), self._facts, state)


def measure(bench: Answering, kind: str, rows: int, rounds: int) -> dict[str, Any]:
    prompts = bench.prompts(kind, rows)
    pairs = []
    for number in range(rounds):
        order = (False, True) if number % 2 else (True, False)
        runs = {guesses: bench.run(prompts, guesses) for guesses in order}
        pairs.append((runs[False], runs[True]))
    plain, guessed = pairs[0]
    least = [min(pair[with_guesses].seconds for pair in pairs) for with_guesses in (0, 1)]
    drafted, tokens = value(guessed.metrics.draft_tokens), sum(map(len, plain.tokens.values()))
    return {
        "gain": round(least[0] / least[1], 3),
        "steps": round(guessed.steps / plain.steps, 3),
        "right": round(value(guessed.metrics.accepted_tokens) / drafted, 3) if drafted else None,
        "same": all(plain.tokens == without.tokens == with_them.tokens for without, with_them in pairs),
        "tokens": tokens,
        "ms": [round(1000 * seconds * rows / tokens, 3) for seconds in least],
    }


def measure_format(report: Report, name: Format, args: argparse.Namespace) -> None:
    """Measure one format of the published model on a GPU."""
    told = {"speculative_config": GUESSES, "batch_invariant": args.batch_invariant, **SETTINGS, **args.settings}
    bench = ScriptedBench(Bench(name, 4096, Sampling(seed=0), **told), args.length)
    found: dict[str, Any] = report.result.setdefault("bf16" if name == "none" else name, {})
    times = bench.bench.runner.step_times
    assert times is not None
    assert times.decode is not None
    report.add(found, "startup_s", bench.bench.startup_s)
    report.add(found, "decode_ms", dict(zip(times.decode.rows, times.decode.ms, strict=True)))
    bench.run(bench.prompts("copy", 1), guesses=True)
    report.add(found, "wait_ms", {rows: round(wait_ms(bench, rows), 3) for rows in args.rows})
    for kind in args.kinds:
        figures: dict[str, Any] = found.setdefault(kind, {})
        for rows in args.rows:
            report.add(figures, f"{rows}", measure(bench, kind, rows, args.rounds))


def wait_ms(bench: ScriptedBench, rows: int) -> float:
    """Return the milliseconds by which a step without guesses is longer if it waits for the one before."""
    prompts = bench.prompts("free", rows)
    ahead, waiting = (bench.run(prompts, guesses=False, waits=waits) for waits in (False, True))
    return 1000 * (waiting.seconds / waiting.steps - ahead.seconds / ahead.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quantization", default="wint4,none", help="on a GPU (%(default)s); none is bf16")
    parser.add_argument("--batch-invariant", action="store_true", help="the operations of that mode")
    parser.add_argument("--kinds", type=lambda text: text.split(","), help="of texts; unset: all")
    parser.add_argument("--rows", type=numbers, help="sequences; unset: 1,2,4,8, on a GPU and 16")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--length", type=int, default=LONGER, help="of answers, on a GPU (%(default)s)")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the engine, on a GPU, as JSON")
    parser.add_argument("--output", type=Path, help="the JSON file")
    args = parser.parse_args()
    args.rounds = args.rounds or ROUNDS[args.device]
    args.rows = args.rows or (ROWS if args.device == "cpu" else (*ROWS, 16))
    args.kinds = args.kinds or (KINDS if args.device == "cpu" else (*KINDS, DRAWN))
    report = Report(args.output, environment(args.device))
    if args.device == "cuda":
        for name in args.quantization.split(","):
            measure_format(report, name, args)
        return
    bench = DemoBench()
    for kind in args.kinds:
        figures: dict[str, Any] = report.result.setdefault(kind, {})
        for rows in args.rows:
            report.add(figures, f"{rows}", measure(bench, kind, rows, args.rounds))


if __name__ == "__main__":
    main()
