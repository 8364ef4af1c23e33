"""Structured output: how long grammars take to compile and their masks to compute, and what guided rows cost a step.

    python -m benchmarks.structured [--output FILE]              # a small model of the real vocabulary's size
    python -m benchmarks.structured --device cuda --output FILE  # the whole model in wint4, and captured steps

Weights are random. The library is measured by itself first, over a tokenizer of the model's size. Then decode steps:
without a grammar, with one for every row, and with one for an eighth of the rows, in turns, so that a machine that is
busy for a while is busy for all three. A GPU needs 80 GB and takes some two minutes. Asserts nothing; the file is
written after each part. Packages:
llguidance, msgspec, redis, hiredis, prometheus-client, tokenizers, sentencepiece, safetensors, torch, triton.

  library                       ms to compile a random schema, us of a mask and of a token, one thread
  steps.<rows>.step_ms          of batches without guided rows, of them alone, with an eighth of them: median of rounds
  steps.<rows>.share            the last two over the first
  steps.<rows>.masks_ms         all masks of a step, each somewhere else in its grammar, on the engine's threads
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from benchmarks.engine import CONFIG, Watch
from benchmarks.steps import GENERATED
from benchmarks.vocabulary import write_tokenizer
from services.engine.__main__ import operations
from services.engine.loop.engine import Engine
from services.engine.loop.mailbox import Add, Mailbox
from services.engine.metrics import EngineMetrics
from services.engine.model.ernie import ErnieModel
from services.engine.model.weights import load_weights
from services.engine.run.assembly import MASK_THREADS, runner_for
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.grammar_state import GrammarState
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import EngineFacts, build
from services.engine.schedule.sequence import Sequence as Asked
from services.engine.settings import EngineSettings
from shared.cpu_share import usable_cores
from shared.grammar import forms
from shared.grammar.compiler import GrammarCompiler
from shared.messages import Generate, Grammar, Output, Request, Sampling, pack_ids
from shared.model.config_file import Quantization
from shared.model.drawn_weights import DrawnWeights
from shared.model.tokenizer import Tokenizer

ROWS = (1, 8, 64)
SCHEMAS = 200
WALK = 100  # tokens followed in each grammar
PROMPT = 128  # tokens
ROUNDS = 3  # of a run of each kind
LENGTH = {"cpu": 24, "cuda": GENERATED}  # tokens of an answer
SMALL = replace(
    CONFIG, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64,
    text_expert_size=64, vision_expert_size=64, shared_expert_size=64, time_freqs=4,
)  # fmt: skip
# A person's record without end, in which free text, numbers, choices and forced text alternate.
RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["reader", "writer", "owner"]},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
    },
    "required": ["name", "age", "role", "zip", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": RECORD, "minItems": 10_000}


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """Return a schema of the kinds that tools and answers have."""
    kind = rng.choice(("object", "object", "array", "string", "number", "enum") if depth else ("string", "integer"))
    if kind == "object":
        names = rng.sample([f"field_{n}" for n in range(40)], rng.randint(1, 8))
        required = rng.sample(names, rng.randint(0, len(names)))
        return {
            "type": kind,
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": required,
            "additionalProperties": rng.random() < 0.2,
        }
    if kind == "array":
        return {"type": kind, "items": random_schema(rng, depth - 1), "maxItems": rng.randint(1, 20)}
    if kind == "enum":
        return {"enum": [f"value {n}" for n in range(rng.randint(2, 30))]}
    return {"type": kind} | ({"maxLength": rng.randint(4, 200)} if kind == "string" and rng.random() < 0.5 else {})


def measure_library(compiler: GrammarCompiler) -> dict[str, dict[str, float]]:
    """Return milliseconds to compile, and microseconds of a mask and of a token."""
    rng = random.Random(0)
    compiled, masks, tokens = list[float](), list[float](), list[float]()
    for _ in range(SCHEMAS):
        text = forms.write(forms.json_schema(random_schema(rng)), thinking=True)
        started = time.perf_counter()
        matcher = compiler.compile(text)
        compiled.append(1e3 * (time.perf_counter() - started))
        for mask_s, token_s in _walk(matcher, rng, WALK):
            masks.append(1e6 * mask_s)
            tokens.append(1e6 * token_s)
    return {"compile_ms": _quantiles(compiled), "mask_us": _quantiles(masks), "token_us": _quantiles(tokens)}


def _walk(matcher: LLMatcher, rng: random.Random, steps: int) -> list[tuple[float, float]]:
    """Append tokens that the grammar allows, up to its end; return the seconds of each one's mask and of itself."""
    times = []
    for _ in range(steps):
        if matcher.is_stopped():
            break
        started = time.perf_counter()
        mask = matcher.compute_bitmask()
        masked = time.perf_counter()
        token = int(rng.choice(np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))))
        drawn = time.perf_counter()
        assert matcher.consume_token(token), matcher.get_error()
        times.append((masked - started, time.perf_counter() - drawn))
    return times


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(max(values), 3)}


class Bench:
    """The engine's loop over a model with random weights."""

    def __init__(self, device: str, compiler: GrammarCompiler) -> None:
        self._length = LENGTH[device]
        on_gpu = device == "cuda"
        config, dtype = (CONFIG, torch.bfloat16) if on_gpu else (SMALL, torch.float32)
        quantization: Quantization | None = "wint4" if on_gpu else None
        where = torch.device(device)
        weights = load_weights(DrawnWeights(where), config, dtype, where, quantization)
        self._settings = EngineSettings(
            redis_url="unix:///unused", model="unused", max_model_len=1024, max_num_seqs=max(ROWS),
            max_num_batched_tokens=16384, enable_prefix_caching=False,
        )  # fmt: skip
        self._facts = EngineFacts(config, 1024, think_close_id=3)
        self._runner, self._blocks = runner_for(ErnieModel(config, weights, operations(device)), config, self._settings)
        self._text = forms.write(forms.json_schema(ENDLESS), thinking=False)
        self._matcher = compiler.compile(self._text)

    def step_ms(self, rows: int) -> dict[str, float]:
        """Return the median time of a decode step of `rows` sequences, by how many of them follow a grammar."""
        kinds = {"none": 0, "all": rows, "eighth": max(1, rows // 8)}
        for guided in kinds.values():
            self._run(rows, guided)  # compiles what was not captured
        rounds = [{kind: self._run(rows, guided) for kind, guided in kinds.items()} for _ in range(ROUNDS)]
        return {kind: statistics.median(times[kind] for times in rounds) for kind in kinds}

    def _run(self, rows: int, guided: int) -> float:
        settings, mailbox = self._settings, Mailbox()
        watch = Watch(mailbox, rows)
        pool = BlockPool(self._blocks, caching=False)
        limits = Limits(settings.max_num_seqs, settings.max_num_batched_tokens, True, settings.block_size)
        scheduler, metrics = Scheduler(pool, limits), EngineMetrics(CollectorRegistry())
        for index in range(rows):
            mailbox.put(Add(self._sequence(index, index < guided)))
        Engine(mailbox, scheduler, pool, self._runner, watch, metrics).run()
        return watch.step_ms()

    def _sequence(self, index: int, guided: bool) -> Asked:
        prompt = np.random.default_rng(index).integers(1000, 100_000, PROMPT).tolist()
        grammar = Grammar(self._text, "response_format") if guided else None
        sampling = Sampling(seed=index, temperature=1.0, ignore_eos=True, grammar=grammar)
        request = Request(f"{index:016x}", "bench", 0, 0.0, sampling, Output(thinking=False))
        state = GrammarState(self._matcher.deep_copy()) if guided else None
        return build(Generate(request, pack_ids(prompt), self._length, ()), 1, (), (), self._facts, state)

    def masks_ms(self, rows: int) -> dict[str, float]:
        """Return the time of the masks of a step of `rows` sequences, by the library alone."""
        masks = GrammarMasks(self._facts.model.vocab_size, min(usable_cores(), MASK_THREADS))
        rng, times = random.Random(0), list[float]()
        matchers = [self._matcher.deep_copy() for _ in range(rows)]
        for matcher in matchers:
            _walk(matcher, rng, rng.randrange(WALK))
        for _ in range(WALK):
            started = time.perf_counter()
            masks.compute([GrammarState(matcher) for matcher in matchers])
            times.append(1e3 * (time.perf_counter() - started))
            for matcher in matchers:
                _walk(matcher, rng, 1)
        return _quantiles(times)


def measure_steps(bench: Bench, rows: int) -> dict[str, Any]:
    step_ms = bench.step_ms(rows)
    return {
        "step_ms": {kind: round(each, 3) for kind, each in step_ms.items()},
        "share": {kind: round(step_ms[kind] / step_ms["none"], 3) for kind in ("all", "eighth")},
        "masks_ms": bench.masks_ms(rows),
    }


def environment(device: str) -> dict[str, Any]:
    """Return where and with what was measured."""
    packages = ("torch", "llguidance", *(("triton",) if device == "cuda" else ()))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {usable_cores():g} cores",
        "versions": {package: version(package) for package in packages},
    }


class Report:
    """The figures so far, in a file and on standard output."""

    def __init__(self, path: Path | None, result: dict[str, Any]) -> None:
        self._path, self.result, self._started = path, result, time.perf_counter()
        self.say(json.dumps(result))

    def say(self, line: str) -> None:
        print(f"{time.perf_counter() - self._started:6.1f} s  {line}", flush=True)

    def add(self, part: dict[str, Any], name: str, figures: Any) -> None:
        part[name] = figures
        self.say(f"{name}: {json.dumps(figures)}")
        if self._path is not None:
            self._path.write_text(json.dumps(self.result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="the JSON file")
    args = parser.parse_args()
    report = Report(args.output, environment(args.device))
    with tempfile.TemporaryDirectory(prefix="millrace-") as scratch:
        write_tokenizer(Path(scratch), CONFIG.vocab_size)
        tokenizer = Tokenizer.load(Path(scratch))
    started = time.perf_counter()
    compiler = GrammarCompiler(tokenizer, CONFIG.vocab_size, CONFIG.eos_ids)
    report.add(report.result, "vocabulary_s", round(time.perf_counter() - started, 2))
    report.add(report.result, "library", measure_library(compiler))
    report.say("loading the model")
    bench = Bench(args.device, compiler)
    steps: dict[str, Any] = report.result.setdefault("steps", {})
    for rows in ROWS:
        report.say(f"measuring steps of {rows} rows")
        report.add(steps, str(rows), measure_steps(bench, rows))


if __name__ == "__main__":
    main()
