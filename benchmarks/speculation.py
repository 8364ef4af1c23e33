"""Speculative decoding on a CPU: tokens for the time against none, by kind of text and number of sequences.

    python -m benchmarks.speculation [--output FILE]

The demo checkpoint, one thread, the engine's loop without Redis, with and without guesses in turns, in seconds of
computing, so that other work on the machine weighs little. The model is too small to copy a page, so a grammar makes it
write `copy` (a text of its prompt) and `table` (lines as of a scanned list, which the prompt does not have); `json`
follows a schema with what is likeliest; `free` are questions about Millrace, answered at temperature 1 and on past
their end. Five minutes on an idle machine; asserts nothing. Packages as for benchmarks.structured.

  <kind>.<rows>.gain      least time without guesses over least time with them
  <kind>.<rows>.steps     steps with guesses over steps without
  <kind>.<rows>.right     share of guesses that were right; null: there were none
  <kind>.<rows>.same      whether all answers are the same tokens
  <kind>.<rows>.tokens    of all answers
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llguidance import LLMatcher
from prometheus_client import CollectorRegistry

from benchmarks.demo_model.prompt import Encoder
from benchmarks.demo_model.questions import questions
from benchmarks.demo_model.sample import Sample, user
from benchmarks.structured import Report, environment
from services.engine.__main__ import load
from services.engine.loop.engine import Engine
from services.engine.loop.mailbox import Add, Mailbox
from services.engine.loop.step_output import StepOutput
from services.engine.metrics import EngineMetrics
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.grammar_state import GrammarState
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import EngineFacts, Sequence, build
from services.engine.schedule.speculation import Speculation
from services.engine.settings import EngineSettings
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
ROUNDS = 6
LENGTH = 96  # tokens of an answer, at most
GUESSING = Speculation(most=8, ngram=3, max_batch=16)
COLOURS = ("red", "green", "blue", "black")

Asked = tuple[str, str | None]  # a question, and the grammar of its answer


class Prompt(NamedTuple):
    ids: list[int]
    grammar: str | None  # of the answer
    matcher: LLMatcher | None  # at its beginning


class Run(NamedTuple):
    """Figures and answers of a run of some prompts."""

    seconds: float  # of computing
    steps: int  # with tokens
    tokens: dict[str, list[int]]
    metrics: EngineMetrics


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


class Sink:
    """Listener that keeps every answer's tokens, and ends the run when all have ended."""

    def __init__(self, mailbox: Mailbox, requests: int) -> None:
        self._mailbox, self._left = mailbox, requests
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.steps = 0

    def __call__(self, output: StepOutput) -> None:
        self.steps += 1
        for message in output.messages().values():
            for run in message.runs:
                self.tokens[run.request_id] += run.tokens
        self._left -= len(output.ended)
        if self._left == 0:
            self._mailbox.close()


class Bench:
    """The engine's loop over the demo checkpoint."""

    def __init__(self) -> None:
        self._settings = EngineSettings(
            redis_url="unix:///unused", model=str(DEMO), max_model_len=1024, torch_threads=1, device="cpu",
            enable_prefix_caching=False,
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

    def run(self, prompts: list[Prompt], speculation: Speculation | None) -> Run:
        settings, mailbox = self._settings, Mailbox()
        sink = Sink(mailbox, len(prompts))
        pool = BlockPool(self._blocks, caching=False)
        most, budget, block = settings.max_num_seqs, settings.max_num_batched_tokens, settings.block_size
        limits = Limits(most, budget, True, block, speculation=speculation)
        scheduler, metrics = Scheduler(pool, limits), EngineMetrics(CollectorRegistry())
        for index, prompt in enumerate(prompts):
            mailbox.put(Add(self._sequence(index, prompt)))
        started = time.process_time()
        Engine(mailbox, scheduler, pool, self._runner, sink, metrics).run()
        return Run(time.process_time() - started, sink.steps, sink.tokens, metrics)

    def _sequence(self, index: int, prompt: Prompt) -> Sequence:
        grammar = None if prompt.grammar is None else Grammar(prompt.grammar, "response_format")
        sampling = Sampling(seed=index, temperature=float(prompt.grammar is None), ignore_eos=True, grammar=grammar)
        request = Request(f"{index:016x}", "bench", 0, 0.0, sampling, Output(thinking=False))
        state = None if prompt.matcher is None else GrammarState(prompt.matcher.deep_copy())
        return build(Generate(request, pack_ids(prompt.ids), LENGTH, ()), 1, (), (), self._facts, state)


def measure(bench: Bench, kind: str, rows: int) -> dict[str, Any]:
    prompts = bench.prompts(kind, rows)
    rounds = []
    for number in range(ROUNDS):
        order = (None, GUESSING) if number % 2 else (GUESSING, None)
        runs = {speculation: bench.run(prompts, speculation) for speculation in order}
        rounds.append((runs[None], runs[GUESSING]))
    plain, guessed = rounds[0]
    drafted = value(guessed.metrics.draft_tokens)
    return {
        "gain": round(min(run.seconds for run, _ in rounds) / min(run.seconds for _, run in rounds), 2),
        "steps": round(guessed.steps / plain.steps, 3),
        "right": round(value(guessed.metrics.accepted_tokens) / drafted, 3) if drafted else None,
        "same": all(guessed.tokens == without.tokens == with_them.tokens for without, with_them in rounds),
        "tokens": sum(map(len, plain.tokens.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file")
    args = parser.parse_args()
    report, bench = Report(args.output, environment("cpu")), Bench()
    for kind in KINDS:
        found: dict[str, Any] = report.result.setdefault(kind, {})
        for rows in ROWS:
            report.add(found, f"{rows}", measure(bench, kind, rows))


if __name__ == "__main__":
    main()
