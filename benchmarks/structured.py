"""Structured output: how long grammars take to compile and their masks to compute, and what guided rows cost a step.

    python -m benchmarks.structured                  # the CPU, with a small model of the real vocabulary's size
    python -m benchmarks.structured --device cuda    # the whole model with random weights, and captured steps

The library is measured by itself first, over a tokenizer of the model's size. Then steps are: without a grammar, with
one for every row, and with one for an eighth of the rows; the last two as a share of the first.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from benchmarks.engine import CONFIG, Drawn, Watch
from benchmarks.steps import GENERATED
from benchmarks.vocabulary import write_tokenizer
from services.engine.__main__ import operations
from services.engine.loop.engine import Engine
from services.engine.loop.mailbox import Add, Mailbox
from services.engine.metrics import EngineMetrics
from services.engine.model.ernie import ErnieModel
from services.engine.model.weights import load_weights
from services.engine.run.assembly import runner_for
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
from shared.model.tokenizer import Tokenizer

ROWS = (1, 8, 64)
SCHEMAS = 200
WALK = 100  # tokens followed in each grammar
PROMPT = 128  # tokens
RUNS = {"cpu": 1, "cuda": 3}
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


def measure_library(compiler: GrammarCompiler) -> dict[str, float]:
    """Return milliseconds to compile, and microseconds of a mask and of a token."""
    rng = random.Random(0)
    compiled: list[float] = []
    masks: list[float] = []
    tokens: list[float] = []
    for _ in range(SCHEMAS):
        text = forms.write(forms.json_schema(random_schema(rng)), thinking=True)
        started = time.perf_counter()
        matcher = compiler.compile(text)
        compiled.append(1e3 * (time.perf_counter() - started))
        _walk(matcher, rng, masks, tokens)
    return {
        **_quantiles("compile_ms", compiled),
        **_quantiles("mask_us", masks),
        **_quantiles("token_us", tokens),
    }


def _walk(matcher: LLMatcher, rng: random.Random, masks: list[float], tokens: list[float]) -> None:
    for _ in range(WALK):
        started = time.perf_counter()
        mask = matcher.compute_bitmask()
        masks.append(1e6 * (time.perf_counter() - started))
        token = int(rng.choice(np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))))
        started = time.perf_counter()
        assert matcher.consume_token(token), matcher.get_error()
        tokens.append(1e6 * (time.perf_counter() - started))
        if matcher.is_stopped():
            return


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, [50, 99])
    found = {"p50": float(p50), "p99": float(p99), "max": max(values)}
    return {f"{name}_{quantile}": round(value, 2) for quantile, value in found.items()}


class Bench:
    """The engine's loop over a model with random weights."""

    def __init__(self, device: str, compiler: GrammarCompiler) -> None:
        self._device, on_gpu = device, device == "cuda"
        config, dtype = (CONFIG, torch.bfloat16) if on_gpu else (SMALL, torch.float32)
        quantization = "wint4" if on_gpu else None
        where = torch.device(device)
        weights = load_weights(Drawn(where, 0), config, dtype, where, quantization)  # type: ignore[arg-type]
        self._settings = EngineSettings(
            redis_url="unix:///unused", model="unused", max_model_len=1024, max_num_seqs=max(ROWS),
            max_num_batched_tokens=16384, enable_prefix_caching=False,
        )  # fmt: skip
        self._facts = EngineFacts(config, 1024, think_close_id=3)
        self._runner, self._blocks = runner_for(ErnieModel(config, weights, operations(device)), config, self._settings)
        self._text = forms.write(forms.json_schema(ENDLESS), thinking=False)
        self._matcher = compiler.compile(self._text)
        self._run(1, 1)  # compiles what was not captured

    def step_ms(self, rows: int, guided: int) -> float:
        """Return the median time of a decode step of `rows` sequences, of which `guided` follow a grammar."""
        return statistics.median(self._run(rows, guided) for _ in range(RUNS[self._device]))

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
        return build(Generate(request, pack_ids(prompt), LENGTH[self._device], ()), 1, (), (), self._facts, state)

    def masks_ms(self, rows: int) -> float:
        """Return the time of the masks of `rows` sequences at the beginning of their records."""
        masks = GrammarMasks(self._facts.model.vocab_size, min(usable_cores(), 8))
        states = [GrammarState(self._matcher.deep_copy()) for _ in range(rows)]
        times = []
        for _ in range(20):
            started = time.perf_counter()
            masks.compute(states)
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)


def measure_steps(bench: Bench) -> list[dict[str, float]]:
    found = []
    for rows in ROWS:
        plain, all_guided, some = (bench.step_ms(rows, guided) for guided in (0, rows, max(1, rows // 8)))
        found.append(
            {
                "rows": rows,
                "step_ms": round(plain, 3),
                "guided_step_ms": round(all_guided, 3),
                "guided_share": round(all_guided / plain, 3),
                "eighth_guided_share": round(some / plain, 3),
                "masks_ms": round(bench.masks_ms(rows), 3),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millrace-") as scratch:
        write_tokenizer(Path(scratch), CONFIG.vocab_size)
        tokenizer = Tokenizer.load(Path(scratch))
    started = time.perf_counter()
    compiler = GrammarCompiler(tokenizer, CONFIG.vocab_size, CONFIG.eos_ids)
    result: dict[str, Any] = {"vocabulary_s": round(time.perf_counter() - started, 2)} | measure_library(compiler)
    print(json.dumps(result), flush=True)
    result["steps"] = measure_steps(Bench(args.device, compiler))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
