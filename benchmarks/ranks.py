"""An engine of one, two and four ranks at the full model's size, on as many cards of one host.

    python -m benchmarks.ranks [--sizes 1,2] [--quantization wint4,none] [--output FILE.json]

Weights are drawn, on every rank the same ones. Each engine runs in a process of its own, since NCCL and memory are a
process's; asserts nothing. Measured of each, under SIZE.QUANTIZATION:

  decode_ms, prefill_tok_s   as in benchmarks.engine
  startup_s, cache_tokens    until the runner is there, captured steps included, and how much the caches hold
  scores                     log-probabilities of the tokens of a prompt: by how much two sizes differ is printed
  tokens                     of greedy answers: how many agree with those of one rank until the first that does not
  contexts                   tokens of cache with --full-size: 131,072 positions and 128 sequences
  lost_s                     with --faults: seconds from the death (kill) or halt (stop) of rank 1, while all decode, to
                             that of the engine, its exit status, and seconds until rank 1 is gone when rank 0 is killed
  exchange_us                with --exchange: one exchange of so many rows, captured, without anything around it
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine import CONFIG, Bench, Watch, numbers, shapes
from benchmarks.steps import PROMPT
from cli.demo import hub_config
from services.engine.__main__ import load
from services.engine.loop.mailbox import Mailbox
from services.engine.loop.step_output import StepOutput
from services.engine.ranks.exchange import Exchange, listen, make_safe, rank_device
from services.engine.ranks.processes import Ranks
from services.engine.schedule.sequence import EngineFacts
from services.engine.settings import EngineSettings
from shared.messages import Sampling
from shared.model.config import load_model_config

SCORED, ANSWERED, ANSWERS = 512, 64, 8
EXCHANGED_ROWS = (1, 8, 32, 128, 256, 1024, 8192)
LONG = 4000  # tokens of answers during which a rank is lost
PATIENCE_S = 300.0


def write_config(directory: Path, device: str) -> None:
    """Write a config.json with the published model's sizes; on a CPU, which tries the program only, a small one's."""
    told = hub_config("bfloat16") | {
        "vocab_size": CONFIG.vocab_size,
        "im_patch_id": 100_295,
        "image_start_token_id": CONFIG.image_start_id,
        "image_end_token_id": CONFIG.image_end_id,
        "video_start_token_id": CONFIG.video_start_id,
        "video_end_token_id": CONFIG.video_end_id,
    }
    if device == "cuda":
        told |= {
            "hidden_size": CONFIG.hidden_size,
            "intermediate_size": CONFIG.intermediate_size,
            "num_hidden_layers": CONFIG.num_layers,
            "num_attention_heads": CONFIG.num_heads,
            "num_key_value_heads": CONFIG.num_kv_heads,
            "max_position_embeddings": CONFIG.max_position_embeddings,
            "freq_allocation": CONFIG.time_freqs,
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
            **told,
        }
        self._settings = EngineSettings(
            redis_url="unix:///unused", model=str(directory), load_format="dummy", device=device,  # type: ignore[arg-type]
            quantization=quantization, tensor_parallel_size=size, **settings,  # type: ignore[arg-type]
        )  # fmt: skip
        config = load_model_config(directory)
        self._sampling = Sampling(seed=0, temperature=0.0, ignore_eos=True)
        self._facts = EngineFacts(config, self._settings.max_model_len, think_close_id=3)
        self.ranks = Ranks(self._settings, os.environ) if size > 1 else None
        started = time.perf_counter()
        self._runner, self._blocks = load(self._settings, config, device, self.ranks)
        self.startup_s = {"load_and_capture": round(time.perf_counter() - started, 1)}
        self.memory = {"cache_tokens": self._blocks * self._settings.block_size}

    def scores(self) -> list[float]:
        """Return the log-probabilities of a prompt's own tokens."""
        found: list[float] = []
        mailbox = Mailbox()

        def hear(step_output: StepOutput) -> None:
            for message in step_output.messages().values():
                for begin in message.begins:
                    if begin.prompt_logprobs is not None:
                        found.extend(np.frombuffer(begin.prompt_logprobs.logprobs, np.float32).tolist())
            if step_output.ended:
                mailbox.close()

        self._sampling = Sampling(seed=0, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
        self.drive([self.sequence(0, SCORED, 1)], mailbox, hear)
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


def measure(directory: Path, size: int, quantization: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one engine, in this process."""
    told = {"max_model_len": 131_072, "max_num_seqs": 128, "gpu_memory_utilization": 0.51} if args.full_size else {}
    bench = Ranked(directory, size, quantization, args.device, **told, **json.loads(args.settings))
    found: dict[str, Any] = {"startup_s": bench.startup_s, "memory": bench.memory}
    bench.run(1, min(PROMPT, args.prompt), 4)
    found["scores"], found["tokens"] = bench.scores(), bench.tokens()
    found["decode_ms"] = {str(n): round(bench.run(n, args.prompt, 72)[1].step_ms(), 3) for n in args.batches}
    found["prefill_tok_s"] = {f"{n}x{length}": round(bench.prefill_tok_s(n, length)) for n, length in args.prefills}
    if bench.ranks is not None:
        bench.ranks.close()
    return found


def decode_for_long(directory: Path, size: int, quantization: str, args: argparse.Namespace) -> dict[str, Any]:
    """Decode until a rank is lost; say when it may be."""
    bench = Ranked(directory, size, quantization, args.device, **json.loads(args.settings))
    mailbox = Mailbox()
    watch = Watch(mailbox, 8)

    def hear(step_output: StepOutput) -> None:
        if not watch.stamps:
            print("decoding", flush=True)
        watch(step_output)

    bench.drive([bench.sequence(index, 100, LONG) for index in range(8)], mailbox, hear)
    return {}


def exchange_us(directory: Path, size: int, quantization: str, args: argparse.Namespace) -> dict[str, float]:
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
    found = {str(rows): _exchange_us(exchange, rows, device) for rows in EXCHANGED_ROWS}
    for other in others:
        other.wait()
    return found


def _exchange_us(exchange: Exchange, rows: int, device: torch.device, inside: int = 56) -> float:
    """Return the microseconds of one of the exchanges of a step, captured where the device can."""
    own = torch.zeros(rows, CONFIG.hidden_size, dtype=torch.bfloat16, device=device)

    def step() -> None:
        for _ in range(inside):
            exchange.gather(own)

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


PARTS: dict[str, Callable[[Path, int, str, argparse.Namespace], dict[str, Any]]] = {
    "measure": measure,
    "faults": decode_for_long,
    "exchange": exchange_us,
}


# --------------------------------------------------------------------------------------------- the processes measured


def start(part: str, directory: Path, size: int, quantization: str) -> "subprocess.Popen[str]":
    """Start this program again, for one part."""
    arguments = ["--part", part, "--directory", str(directory), "--sizes", str(size), "--quantization", quantization]
    command = [sys.executable, "-m", "benchmarks.ranks", *sys.argv[1:], *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def result_of(process: "subprocess.Popen[str]") -> Any:
    """Return what a part has found; where it failed, its exit status."""
    said, _ = process.communicate()
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines and process.returncode == 0 else {"failed": process.returncode}


def lose(directory: Path, size: int, quantization: str, number: signal.Signals, who: str) -> dict[str, Any]:
    """Signal rank 1, or rank 0, while they decode; return how long the other needs to end, and with what status."""
    engine = start("faults", directory, size, quantization)
    assert engine.stdout is not None
    while (line := engine.stdout.readline()) and "decoding" not in line:
        pass
    [first, *_] = sorted(
        int(pid) for file in Path(f"/proc/{engine.pid}/task").glob("*/children") for pid in file.read_text().split()
    )
    time.sleep(1)  # some steps
    os.kill(engine.pid if who == "rank 0" else first, number)
    started = time.perf_counter()
    while time.perf_counter() - started < PATIENCE_S:
        if engine.poll() is not None and not _lives(first):
            break
        time.sleep(0.01)
    seconds = round(time.perf_counter() - started, 2)
    engine.kill()
    return {"all_gone_s": seconds, "status": engine.wait()}


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def compare(one: dict[str, Any], several: dict[str, Any]) -> dict[str, Any]:
    """Return by how much the numbers of two engines differ."""
    pairs = list(zip(one["scores"], several["scores"], strict=True))
    apart = [abs(a - b) for a, b in pairs]
    distance = {"mean": statistics.fmean(apart), "most": max(apart)}
    same = [
        next((i for i, (a, b) in enumerate(zip(*both, strict=True)) if a != b), ANSWERED)
        for both in zip(one["tokens"], several["tokens"], strict=True)
    ]
    return {"scores_apart": distance, "tokens_before_the_first_other": same}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=numbers, default="1,2", help="ranks (%(default)s)")
    parser.add_argument("--quantization", default="wint4,none", help="none is bf16 (%(default)s)")
    parser.add_argument("--batches", type=numbers, default="1,8,32,64,128,256")
    parser.add_argument("--prefills", type=shapes, default="1x1024,1x8192,16x1024")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens, of decode_ms (%(default)s)")
    parser.add_argument("--full-size", action="store_true", help="131,072 positions, 128 sequences, as if on 80 GB")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--exchange", action="store_true")
    parser.add_argument("--settings", default="{}", help="others of the engine, as JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="the JSON file")
    for hidden, kind in {"part": str, "directory": Path, "rank": int, "port": int}.items():
        parser.add_argument(f"--{hidden}", type=kind, default=0 if kind is int else None, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_all(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure every size and quantisation, each in a process of its own."""
    result: dict[str, Any] = {}
    several = [size for size in args.sizes if size > 1]
    if args.exchange:
        for size in several:
            _note(args, result, f"{size}.exchange_us", result_of(start("exchange", directory, size, "none")))
    for quantization in args.quantization.split(","):
        for size in args.sizes:
            name = f"{size}.{quantization}"
            found = result_of(start("measure", directory, size, quantization))
            first = result.get(f"{args.sizes[0]}.{quantization}")
            if first is not None and "scores" in found and "scores" in first:
                found["against_one"] = compare(first, found)
            _note(args, result, name, found)
    if args.faults:
        for size in several:
            part = partial(lose, directory, size, args.quantization.split(",")[0])
            for who, number in (("rank 1", signal.SIGKILL), ("rank 1", signal.SIGSTOP), ("rank 0", signal.SIGKILL)):
                _note(args, result, f"{size}.{number.name} to {who}", part(number, who))
    return result


def _note(args: argparse.Namespace, result: dict[str, Any], name: str, found: Any) -> None:
    result[name] = found
    print(name, json.dumps({key: value for key, value in found.items() if key not in ("scores", "tokens")}), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    args = parse()
    make_safe(os.environ)
    if args.part:
        print(json.dumps(PARTS[args.part](args.directory, args.sizes[0], args.quantization, args)), flush=True)
        os._exit(0)  # threads of libraries may be in C++
    with tempfile.TemporaryDirectory(prefix="millrace-ranks-") as scratch:
        write_config(Path(scratch), args.device)
        measure_all(Path(scratch), args)


if __name__ == "__main__":
    main()
