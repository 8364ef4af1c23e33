"""An engine of one, two and four ranks at the full model's size, on as many cards of one host.

    python -m benchmarks.ranks [--sizes 1,2] [--quantization wint4,none] [--output FILE.json]

Weights are drawn, on every rank the same ones. Each engine runs in a process of its own, since NCCL and memory are a
process's, and is given up after --limit seconds, when all its threads say where they are; asserts nothing. What is in
FILE.json already stays. Measured of each, under SIZE.QUANTIZATION:

  decode_ms, prefill_tok_s   as in benchmarks.engine
  startup_s, cache_tokens    until the runner is there, captured steps included, and how much the caches hold
  scores                     log-probabilities of the tokens of a prompt: by how much two sizes differ is printed, and
                             by how much those of one do beside seven other prompts (noise), where sums are rounded
                             otherwise
  tokens                     of greedy answers: how many agree with those of one rank until the first that does not
  SIGNAL to RANK             with --faults: seconds from then, while all decode, until no process of the engine is left,
                             and rank 0's exit status
  kernels                    with --profile: of a decode step and of the prefills on the first rank, longest first
  exchange_us                with --exchange: one exchange of so many rows, captured, with nothing around it: by NCCL,
                             and by writing to the other card's memory (null where that does not work), with the number
                             of those that gave anything else than NCCL's (wrong)
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine import CONFIG, Bench, Watch, numbers, shapes
from benchmarks.rank_processes import DECODE, DONE, Part
from benchmarks.steps import GENERATED, PROMPT
from cli.demo import hub_config
from services.engine.__main__ import load
from services.engine.loop.mailbox import Mailbox
from services.engine.loop.step_output import StepOutput
from services.engine.ranks.exchange import Exchange, Shortcut, listen, make_safe, rank_device
from services.engine.ranks.processes import Ranks
from services.engine.schedule.sequence import EngineFacts
from services.engine.settings import EngineSettings
from shared.messages import Sampling
from shared.model.config import load_model_config

SCORED, ANSWERED, ANSWERS = 512, 64, 8
BESIDE = 7  # prompts
EXCHANGED_ROWS = (1, 8, 32, 128, 256, 1024, 8192)
LONG = 4000  # tokens of answers during which a rank is lost
MEASURE = "measure"  # what an engine is asked for
UNPRINTED = ("scores", "tokens", "kernels")


def write_config(directory: Path, device: str) -> None:
    """Write a config.json with the published model's sizes; on a CPU, which tries the program only, a small one's."""
    told = hub_config("bfloat16") | {
        "vocab_size": CONFIG.vocab_size,
        # The last ones: no token of a prompt, and hardly one of an answer.
        "im_patch_id": CONFIG.vocab_size - 5,
        "image_start_token_id": CONFIG.vocab_size - 4,
        "image_end_token_id": CONFIG.vocab_size - 3,
        "video_start_token_id": CONFIG.vocab_size - 2,
        "video_end_token_id": CONFIG.vocab_size - 1,
    }
    if device == "cuda":
        half, of_time = CONFIG.head_dim // 2, CONFIG.time_freqs
        told |= {
            "hidden_size": CONFIG.hidden_size,
            "intermediate_size": CONFIG.intermediate_size,
            "num_hidden_layers": CONFIG.num_layers,
            "num_attention_heads": CONFIG.num_heads,
            "num_key_value_heads": CONFIG.num_kv_heads,
            "max_position_embeddings": CONFIG.max_position_embeddings,
            "freq_allocation": of_time,
            "rope_scaling": {"type": "default", "mrope_section": [*[(half - of_time) // 2] * 2, of_time]},
            "rope_theta": CONFIG.rope_theta,
            "moe_num_experts": [CONFIG.num_experts] * 2,
            "moe_intermediate_size": [CONFIG.text_expert_size, CONFIG.vision_expert_size],
            "moe_k": CONFIG.experts_per_token,
            "moe_layer_end_index": [CONFIG.num_layers + 1, CONFIG.num_layers],
        }
    (directory / "config.json").write_text(json.dumps(told))


class Ranked(Bench):
    """An engine of several ranks, of which this process is the first."""

    def __init__(self, directory: Path, size: int, quantization: str, device: str, **told: Any) -> None:
        settings = {
            "max_num_batched_tokens": 16384,
            "max_model_len": 32768,
            "max_num_seqs": 256,
            "enable_prefix_caching": False,
            "max_token_gap_ms": 0.0,  # else the first have ended before the last begin
            "step_timeout_s": 10.0,
            **told,
        }
        self.settings = EngineSettings(
            redis_url="unix:///unused", model=str(directory), load_format="dummy", device=device,  # type: ignore[arg-type]
            quantization=quantization, tensor_parallel_size=size, **settings,  # type: ignore[arg-type]
        )  # fmt: skip
        config = load_model_config(directory)
        self._sampling = Sampling(seed=0, temperature=0.0, ignore_eos=True)
        self._facts = EngineFacts(config, self.settings.max_model_len, think_close_id=3)
        self.ranks = Ranks(self.settings, os.environ) if size > 1 else None
        started = time.perf_counter()
        self.runner, self._blocks = load(self.settings, config, device, self.ranks)
        self.startup_s = {"load_and_capture": round(time.perf_counter() - started, 1)}
        self.memory = {"cache_tokens": self._blocks * self.settings.block_size}

    def scores(self, beside: int = 0) -> list[float]:
        """Return the log-probabilities of a prompt's own tokens, computed beside so many other prompts."""
        found: list[float] = []
        mailbox, left = Mailbox(), 1 + beside

        def hear(step_output: StepOutput) -> None:
            nonlocal left
            for message in step_output.messages().values():
                for begin in message.begins:
                    if begin.prompt_logprobs is not None and int(begin.request_id, 16) == 0:
                        found.extend(np.frombuffer(begin.prompt_logprobs.logprobs, np.float32).tolist())
            left -= len(step_output.ended)
            if left == 0:
                mailbox.close()

        self._sampling = Sampling(seed=0, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
        self.drive([self.sequence(index, SCORED, 1) for index in range(1 + beside)], mailbox, hear)
        self._sampling = Sampling(seed=0, temperature=0.0, ignore_eos=True)
        return found

    def tokens(self) -> list[list[int]]:
        """Return the tokens of greedy answers."""
        mailbox, answers = Mailbox(), [list[int]() for _ in range(ANSWERS)]
        left = ANSWERS

        def hear(step_output: StepOutput) -> None:
            nonlocal left
            for message in step_output.messages().values():
                for run in message.runs:
                    answers[int(run.request_id, 16)].extend(run.tokens)
            left -= len(step_output.ended)
            if left == 0:
                mailbox.close()

        self.drive([self.sequence(index, 100, ANSWERED) for index in range(ANSWERS)], mailbox, hear)
        return answers


def run_engine(directory: Path, size: int, quantization: str, args: argparse.Namespace) -> None:
    """Load an engine in this process, and do with it what the lines of standard input ask for."""
    bench = Ranked(directory, size, quantization, args.device, **json.loads(args.settings))
    tell({"startup_s": bench.startup_s, "memory": bench.memory}, done=True)
    for line in sys.stdin:
        if line.strip() == MEASURE:
            measure(bench, args)
        elif line.strip() == DECODE:
            decode_for_long(bench)
    if bench.ranks is not None:
        bench.ranks.close()


def tell(found: dict[str, Any], done: bool = False) -> None:
    """Give the process that has started this one some results."""
    print(json.dumps({**found, DONE: done}), flush=True)


def measure(bench: Ranked, args: argparse.Namespace) -> None:
    """Measure one engine; tell each figure at once."""
    bench.run(1, min(PROMPT, args.prompt), 4)
    scores = bench.scores()
    tell({"scores": scores, "noise": apart(scores, bench.scores(BESIDE)), "tokens": bench.tokens()})
    decode_ms, prefill_tok_s, kernels = dict[str, float](), dict[str, int](), dict[str, Any]()
    for count in args.batches:
        decode_ms[str(count)] = round(bench.run(count, args.prompt, GENERATED)[1].step_ms(), 3)
        tell({"decode_ms": decode_ms})
    for count, length in args.prefills:
        prefill_tok_s[f"{count}x{length}"] = round(bench.prefill_tok_s(count, length))
        tell({"prefill_tok_s": prefill_tok_s})
    for count in args.profile:
        kernels[str(count)] = bench.kernels(count)
        tell({"kernels": kernels})
    for count, length in args.prefills if args.profile else ():
        kernels[f"{count}x{length}"] = bench.prefill_kernels(count, length)
        tell({"kernels": kernels})
    tell({}, done=True)


def decode_for_long(bench: Ranked) -> None:
    """Decode until a rank is lost; say when it may be."""
    mailbox = Mailbox()
    watch = Watch(mailbox, 8)

    def hear(step_output: StepOutput) -> None:
        if not watch.stamps:
            tell({}, done=True)
        watch(step_output)

    with bench.ranks or contextlib.nullcontext():
        bench.drive([bench.sequence(index, 100, LONG) for index in range(8)], mailbox, hear)


def exchange_us(directory: Path, size: int, quantization: str, args: argparse.Namespace) -> None:
    """Measure exchanges alone, on this rank and those that it starts."""
    rank, meeting = args.rank, args.port
    others = []
    if rank == 0:
        meeting = listen()
        command = [sys.executable, "-m", "benchmarks.ranks", *sys.argv[1:], "--port", str(meeting.getsockname()[1])]
        others = [subprocess.Popen([*command, "--rank", str(other)]) for other in range(1, size)]
    device = rank_device(args.device, rank)
    exchange = Exchange(rank, size, meeting, device, lambda: None)
    exchange.least(0)
    ways = {"nccl": exchange.gather}
    found: dict[str, Any] = {"nccl": {}, "direct": None}
    if device.type == "cuda":
        from services.engine.ranks.direct import Form, connect  # Triton exists for Linux only

        direct = connect(rank, size, device, Form.of(CONFIG), exchange.least)
        if direct is not None:
            torch.cuda.manual_seed(rank)
            ways["direct"], found["direct"] = direct.gather, {}
            found["wrong"] = sum(_differ(exchange, direct, rows, device) for rows in EXCHANGED_ROWS)
    for rows in EXCHANGED_ROWS:
        for name, gather in ways.items():
            found[name][str(rows)] = _exchange_us(gather, rows, device)
            print(rank, name, rows, found[name][str(rows)], file=sys.stderr, flush=True)
    for other in others:
        other.wait()
    if rank == 0:
        tell(found, done=True)


def _differ(exchange: Exchange, direct: Shortcut, rows: int, device: torch.device, times: int = 20) -> int:
    """Return how many direct exchanges of drawn rows gave something else."""
    wrong = 0
    for _ in range(times):
        own = torch.randn(rows, CONFIG.hidden_size, device=device).bfloat16()
        wrong += not torch.equal(direct.gather(own), exchange.gather(own))
    return wrong


def _exchange_us(gather: Callable[[torch.Tensor], torch.Tensor], rows: int, device: torch.device) -> float:
    """Return the microseconds of one of the exchanges of a step, captured where the device can."""
    own, inside = torch.zeros(rows, CONFIG.hidden_size, dtype=torch.bfloat16, device=device), 56

    def step() -> None:
        for _ in range(inside):
            gather(own)

    run: Callable[[], None] = step
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        run = graph.replay
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return round(1e6 * statistics.median(times) / inside, 1)


PARTS: dict[str, Callable[[Path, int, str, argparse.Namespace], None]] = {
    "engine": run_engine,
    "exchange": exchange_us,
}


def compare(one: dict[str, Any], several: dict[str, Any]) -> dict[str, Any]:
    """Return by how much the numbers of two engines differ."""
    same = [
        next((i for i, (a, b) in enumerate(zip(*both, strict=True)) if a != b), ANSWERED)
        for both in zip(one["tokens"], several["tokens"], strict=True)
    ]
    return {"scores_apart": apart(one["scores"], several["scores"]), "tokens_before_the_first_other": same}


def apart(some: list[float], others: list[float]) -> dict[str, float]:
    """Return by how much numbers differ."""
    distances = [abs(a - b) for a, b in zip(some, others, strict=True)]
    return {"mean": statistics.fmean(distances), "most": max(distances)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=numbers, default="1,2", help="ranks (%(default)s)")
    parser.add_argument("--quantization", default="wint4,none", help="none is bf16 (%(default)s)")
    parser.add_argument("--batches", type=numbers, default="1,8,32,64,128,256")
    parser.add_argument("--prefills", type=shapes, default="1x1024,1x8192,16x1024")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens, of decode_ms (%(default)s)")
    parser.add_argument("--profile", type=numbers, default="", help="batches, of kernels")
    parser.add_argument("--no-engines", action="store_true", help="neither load nor measure any")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one engine (%(default)s)")
    parser.add_argument(
        "--together", action="store_true", help="load all engines at once; --settings must have them fit on the cards"
    )
    parser.add_argument("--faults", action="store_true", help="with --together: lose a rank of each engine in the end")
    parser.add_argument("--exchange", action="store_true")
    parser.add_argument("--settings", default="{}", help="others of the engine, as JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="the JSON file")
    for hidden, kind in {"part": str, "directory": Path, "rank": int, "port": int}.items():
        parser.add_argument(f"--{hidden}", type=kind, default=0 if kind is int else None, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_all(directory: Path, args: argparse.Namespace) -> None:
    """Measure every size and quantisation, each in a process of its own; then lose ranks of those that have several."""
    results = Results(args.output)
    if args.exchange:
        for size in (size for size in args.sizes if size > 1):
            part = Part("exchange", directory, size, "none")
            part.ask("", args.limit)
            results.note(f"{size}.exchange_us", part.found)
    asked = [] if args.no_engines else [(q, size) for q in args.quantization.split(",") for size in args.sizes]
    if not args.together:
        for quantization, size in asked:
            part = Part("engine", directory, size, quantization)
            measure_part(part, args, results)
            part.end()
        return
    parts = [Part("engine", directory, size, q, nth // len(args.sizes) if size == 1 else None)
             for nth, (q, size) in enumerate(asked)]  # fmt: skip
    alone, several = ([part for part in parts if (part.size == 1) == one] for one in (True, False))
    with ThreadPoolExecutor() as at_once:
        list(at_once.map(lambda part: part.ask("", args.limit), parts))
        list(at_once.map(lambda part: measure_part(part, args, results, loaded=True), alone))
        for part in alone:
            part.end()
        for part in several:
            measure_part(part, args, results, loaded=True)
        cases = [("rank 1", signal.SIGKILL), ("rank 1", signal.SIGSTOP), ("rank 0", signal.SIGKILL)]
        lost = [(f"{number.name} to {who}: {part.name}", at_once.submit(part.lose, number, who, args.limit))
                for part, (who, number) in zip(several, cases, strict=False) if args.faults]  # fmt: skip
        for name, one in lost:
            results.note(name, one.result())
    for part in several:
        part.end()


def measure_part(part: Part, args: argparse.Namespace, results: "Results", loaded: bool = False) -> None:
    """Measure an engine, and compare it with that of one rank."""
    if not loaded:
        part.ask("", args.limit)
    if "failed" not in part.found:
        part.ask(MEASURE, args.limit)
    one = results.all.get(f"1.{part.name.partition('.')[2]}", {})
    if "scores" in one and "scores" in part.found:
        part.found["against_one"] = compare(one, part.found)
    results.note(part.name, part.found)


class Results:
    """Findings, on standard output and in a file."""

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self.all: dict[str, Any] = json.loads(output.read_text()) if output is not None and output.exists() else {}

    def note(self, name: str, found: dict[str, Any]) -> None:
        self.all[name] = found
        print(name, json.dumps({key: value for key, value in found.items() if key not in UNPRINTED}), flush=True)
        if self._output is not None:
            self._output.write_text(json.dumps(self.all, indent=1) + "\n")


def main() -> None:
    args = parse()
    make_safe(os.environ)
    if args.part:
        PARTS[args.part](args.directory, args.sizes[0], args.quantization, args)
        os._exit(0)  # threads of libraries may be in C++
    with tempfile.TemporaryDirectory(prefix="millrace-ranks-") as scratch:
        write_config(Path(scratch), args.device)
        measure_all(Path(scratch), args)


if __name__ == "__main__":
    main()
