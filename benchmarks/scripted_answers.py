"""Answers that a model of random weights is made to give: its steps cost what they cost, and their tokens are a text's.

A step computes logits and draws from them as ever. Then the tokens drawn are overwritten by the script's, which costs
one copy of a few bytes and one kernel. So a sequence's next token is known in advance, as is whether a guess is right.
"""

import random
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from prometheus_client import CollectorRegistry
from torch import Tensor

from benchmarks.engine import Bench
from services.engine.loop.mailbox import Mailbox
from services.engine.loop.step_output import StepOutput
from services.engine.metrics import EngineMetrics
from services.engine.run.assembly import sampling_ops
from services.engine.run.runner import Launched, ModelRunner
from services.engine.run.sampler import Sampler
from services.engine.run.sampling_plan import SamplingPlan
from services.engine.run.upload import upload
from services.engine.schedule.plan import Plan
from services.engine.schedule.sequence import Sequence, build
from services.engine.schedule.step_times import StepTimes
from shared.messages import Generate, Output, Request, Sampling, pack_ids

PAGES = ("README.md", "docs/design.md", "docs/guarantees.md")
COLOURS = ("red", "green", "blue", "black")
ASKED = 256  # tokens of a prompt, beside what it brings of the answer
WORD = re.compile(r" ?[^\W\d_]+|\d|\s+|.")  # about what a large vocabulary has: words, digits, marks

Texts = tuple[str, str]  # a prompt, and the answer


def ids(text: str) -> list[int]:
    """Return ids of a text's words: the same for the same word, and hardly ever for another."""
    return [1000 + zlib.crc32(word.encode()) % 100_000 for word in WORD.findall(text)]


def prose(rng: random.Random) -> str:
    """Return a part of the documentation from some paragraph on."""
    paragraphs = Path(rng.choice(PAGES)).read_text(encoding="utf-8").split("\n\n")
    first = rng.randrange(len(paragraphs) // 2)
    return "\n\n".join(paragraphs[first:])


def copy(rng: random.Random) -> Texts:
    text = prose(rng)
    return f"Copy this text: {text}", text


def table(rng: random.Random) -> Texts:
    lines = (f"| {rng.randrange(1000)} | {rng.choice(COLOURS)} | {rng.randrange(100)}.00 EUR |" for _ in range(99))
    return prose(rng), "\n".join(lines)


def records(rng: random.Random) -> Texts:
    cities = ("Paris", "Rome", "Oslo")
    made = (f'{{"city": "{rng.choice(cities)}", "degrees": {rng.randrange(50)}}}' for _ in range(99))
    return prose(rng), "[" + ", ".join(made) + "]"


def free(rng: random.Random) -> Texts:
    """Return a page's beginning, and how it goes on."""
    page = prose(rng)
    cut = len("".join(WORD.findall(page)[:ASKED]))
    return page[:cut], page[cut:]


DRAWN = "drawn"  # the model's own tokens, of two that are allowed, so that many guesses are right
PAIR = (1000, 2000)
KINDS: dict[str, Callable[[random.Random], Texts]] = {"copy": copy, "table": table, "json": records, "free": free}


class Run(NamedTuple):
    """Figures and answers of a run of some requests."""

    seconds: float
    steps: int  # with tokens
    tokens: dict[str, list[int]]
    metrics: EngineMetrics


class Sink:
    """Listener that keeps every answer's tokens and when they came, and ends the run when all have ended."""

    def __init__(self, mailbox: Mailbox, requests: int) -> None:
        self._mailbox, self._left = mailbox, requests
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.stamps: list[float] = []

    def __call__(self, output: StepOutput) -> None:
        self.stamps.append(time.perf_counter())
        for message in output.messages().values():
            for run in message.runs:
                self.tokens[run.request_id] += run.tokens
        self._left -= len(output.ended)
        if self._left == 0:
            self._mailbox.close()


class ScriptedSampler(Sampler):
    """Sampler that says what it is told, if anything, instead of what it drew."""

    said: list[int] | None = None

    def _draw(self, logits: Tensor, plan: SamplingPlan, on_device: dict[str, Tensor]) -> Tensor:
        tokens = super()._draw(logits, plan, on_device)
        if self.said is None:
            return tokens
        (said,) = upload([np.array(self.said)], tokens.device)
        return tokens.copy_(said)


class ScriptedRunner:
    """Runner that tells its sampler what to say: of each request, the tokens of its answer."""

    def __init__(self, runner: ModelRunner, sampler: ScriptedSampler) -> None:
        self._runner, self._sampler = runner, sampler
        runner._sampler = sampler
        self.waits = False  # for every step before the next is launched
        self.answers: dict[str, list[int]] | None = None  # None: what is drawn

    @property
    def overlaps(self) -> bool:
        return self._runner.overlaps and not self.waits

    @property
    def step_times(self) -> StepTimes | None:
        return self._runner.step_times

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        answers = self.answers
        said = answers and [answers[draw.sequence.request_id][draw.generated] for draw in plan.draws()]
        self._sampler.said = said or None
        return self._runner.launch(plan, meanwhile)


class Scripted(NamedTuple):
    """A prompt, and what is to be answered; None: what the model draws."""

    prompt: list[int]
    answer: list[int] | None


class ScriptedBench:
    """The engine's loop over random weights."""

    def __init__(self, bench: Bench, length: int) -> None:
        """`length`: of answers."""
        self.bench, self._length = bench, length
        inner, config = bench.runner, bench.facts.model
        assert isinstance(inner, ModelRunner)
        ops = sampling_ops("rejection", on_gpu=inner.model.device.type == "cuda")
        self._runner = ScriptedRunner(inner, ScriptedSampler(config.eos_ids, ops, inner.model.device))
        bench.runner = self._runner
        self._guesses = bench.settings.speculative_config

    def prompts(self, kind: str, rows: int) -> list[Scripted]:
        rng, made = random.Random(f"{kind} {rows}"), []
        for _ in range(rows):
            if kind == DRAWN:
                made.append(Scripted(ids(prose(rng))[:ASKED], None))
                continue
            asked, answer = (ids(text) for text in KINDS[kind](rng))
            asked = asked[: ASKED + self._length if kind == "copy" else ASKED]
            assert len(answer) >= self._length
            made.append(Scripted(asked, answer))
        return made

    def run(self, prompts: list[Scripted], guesses: bool, waits: bool = False) -> Run:
        """Answer all at once; the seconds are those from the first tokens to the last."""
        made = [self._sequence(index, each) for index, each in enumerate(prompts)]
        answers = {s.request_id: each.answer for s, each in zip(made, prompts, strict=True) if each.answer}
        self._runner.answers, self._runner.waits = answers or None, waits
        config = self._guesses if guesses else None
        self.bench.settings = msgspec.structs.replace(self.bench.settings, speculative_config=config)
        mailbox, metrics = Mailbox(), EngineMetrics(CollectorRegistry())
        sink = Sink(mailbox, len(made))
        self.bench.drive(made, mailbox, sink, metrics)
        return Run(sink.stamps[-1] - sink.stamps[0], len(sink.stamps), sink.tokens, metrics)

    def _sequence(self, index: int, each: Scripted) -> Sequence:
        allowed = () if each.answer else PAIR
        sampling = Sampling(seed=index, temperature=1.0, top_p=0.8, ignore_eos=True, allowed_token_ids=allowed)
        request = Request(f"{index:016x}", "bench", 0, 0.0, sampling, Output(thinking=False))
        return build(Generate(request, pack_ids(each.prompt), self._length, ()), 1, (), (), self.bench.facts)
