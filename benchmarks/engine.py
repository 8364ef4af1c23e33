"""The engine at the full model's size: in one process without Redis, and once more as it is served.

    python -m benchmarks.engine [--quantization wint4] [--output FILE.json]

Weights are drawn on the device (`shared.model.drawn_weights`), tensor by tensor through the loader that reads
checkpoints, so that routing spreads over all experts and loading has the memory it has in service; each quantisation is
loaded once. Every token is a text token, as in the text model that vLLM was measured with: random weights draw an id
from image_patch_id on 3 times in 100, each of which would visit the vision pool. Needs a CUDA device of 80 GB (141 GB
for bf16 with 256 sequences) and some four minutes; asserts nothing. With --output the figures are kept as JSON, written
after each quantisation (`wint4`, `wint8`, `bf16`) under

  decode_ms.<quant>.<batch>            N prompts of 1,024 tokens, greedy or by --sampling: ms a step, which is the mean
                                       time between emissions with a token of each
  prefill_tok_s.<quant>.<n>x<len>      n prompts of a length, one token each: prompt tokens over the time from the first
                                       step to the last emission, the median of three
  decode_ms_redis.<quant>.<batch>      as decode_ms, with Redis, a postproc and a reader for the gateway around it: the
                                       mean time between messages of the tokens stream with a token of each, as another
                                       process reads them
  delta_ms_redis.<quant>.<batch>       p50 and p99 from a token's message there to its delta at the gateway's reader
  long_context.<quant>                 one prompt of --long-context tokens: prefill_tok_s, and decode_ms behind it
  memory, startup_s, decode_kernels, prefill_kernels, ceilings
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import triton
from prometheus_client import CollectorRegistry
from torch.profiler import ProfilerActivity, profile

from benchmarks import engine_service
from benchmarks.engine_client import Passage
from benchmarks.steps import GENERATED, PROMPT, WARM_STEPS, step_ms
from services.engine.__main__ import operations, prefill_budget, speculation
from services.engine.loop.engine import Engine
from services.engine.loop.mailbox import Add, Mailbox
from services.engine.loop.step_output import StepOutput
from services.engine.metrics import EngineMetrics
from services.engine.model.ernie import ErnieModel
from services.engine.model.weights import load_weights
from services.engine.run.assembly import runner_for
from services.engine.run.runner import Runner
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import EngineFacts, build
from services.engine.schedule.sequence import Sequence as Asked
from services.engine.settings import EngineSettings, SamplingClass
from shared.messages import Generate, Output, Request, Sampling, pack_ids
from shared.model.config import ModelConfig, VisionConfig
from shared.model.config_file import Quantization
from shared.model.drawn_weights import ATTENTION_STD, DrawnWeights

PROFILED_STEPS = 8

CONFIG = ModelConfig(
    vocab_size=103424,
    hidden_size=2560,
    intermediate_size=12288,
    num_layers=28,
    num_heads=20,
    num_kv_heads=4,
    head_dim=128,
    max_position_embeddings=131072,
    norm_eps=1e-5,
    rope_theta=500000.0,
    time_freqs=20,
    tie_embeddings=True,
    num_experts=64,
    text_expert_size=1536,
    vision_expert_size=512,
    experts_per_token=6,
    num_shared_experts=2,
    shared_expert_size=3072,
    dense_layers=(0,),
    image_patch_id=103424,  # beyond the vocabulary: see the docstring
    image_start_id=101304,
    image_end_id=101305,
    video_start_id=101306,
    video_end_id=101307,
    pad_id=0,
    bos_id=1,
    eos_ids=(2,),
    dtype="bfloat16",
    vision=VisionConfig(
        depth=32,
        hidden_size=1280,
        num_heads=16,
        intermediate_size=5120,
        patch_size=14,
        in_channels=3,
        spatial_merge_size=2,
        temporal_merge_size=2,
        norm_eps=1e-6,
        rope_theta=10000.0,
    ),
)


class Watch:
    """Sink of step outputs: records when each came, and with how many tokens; ends the run when every request has
    ended."""

    def __init__(self, mailbox: Mailbox, requests: int, profiler: "profile | None" = None) -> None:
        self._mailbox, self._left, self._requests = mailbox, requests, requests
        self._profiler = profiler
        self.stamps: list[tuple[float, int]] = []

    def __call__(self, step_output: StepOutput) -> None:
        tokens = sum(len(run.tokens) for message in step_output.messages().values() for run in message.runs)
        self.stamps.append((time.perf_counter(), tokens))
        self._left -= len(step_output.ended)
        if self._left == 0:
            self._mailbox.close()
        if self._profiler is not None:
            full = sum(count == self._requests for _, count in self.stamps)
            if full == WARM_STEPS:
                self._profiler.start()
            elif full == WARM_STEPS + PROFILED_STEPS:
                torch.cuda.synchronize()
                self._profiler.stop()

    def step_ms(self) -> float:
        return step_ms(self.stamps, self._requests)


class Bench:
    """One quantisation of the model, loaded."""

    def __init__(
        self,
        quantization: Literal["none", "wint8", "wint4"],
        max_model_len: int,
        sampling: Sampling,
        sampling_class: SamplingClass = "rejection",
        attention_std: float = ATTENTION_STD,
        **told: Any,
    ) -> None:
        """
        Args:
            attention_std: see `shared.model.drawn_weights`.
            told: other settings of the engine.
        """
        self._sampling = sampling
        device = torch.device("cuda")
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        chosen: Quantization | None = None if quantization == "none" else quantization
        ops = operations("cuda", told.get("batch_invariant", False))
        drawn = DrawnWeights(device, attention_std=attention_std)
        weights = load_weights(drawn, CONFIG, torch.bfloat16, device, chosen, quantize=ops.quantize)
        torch.cuda.synchronize()
        loaded = time.perf_counter()
        self.memory = {
            "weights_gib": torch.cuda.memory_allocated() / 2**30,
            "peak_while_loading_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        self.settings = EngineSettings(
            redis_url="unix:///unused",
            model="unused",
            max_model_len=max_model_len,
            quantization=quantization,
            enable_prefix_caching=False,
            sampling_class=sampling_class,
            # With a bound on gaps, the first of many prompts have been answered before the last are computed.
            **{"max_num_seqs": 256, "max_num_batched_tokens": 16384, "max_token_gap_ms": 0.0, **told},
        )
        self.facts = EngineFacts(CONFIG, max_model_len, think_close_id=3)
        self.runner: Runner
        model = ErnieModel(CONFIG, weights, ops)
        self.runner, self._blocks = runner_for(model, CONFIG, self.settings)
        torch.cuda.synchronize()
        self.startup_s = {"load": loaded - started, "profile_and_capture": time.perf_counter() - loaded}
        self.memory["cache_tokens"] = self._blocks * self.settings.block_size
        self.memory["reserved_gib"] = torch.cuda.memory_reserved() / 2**30

    def run(self, count: int, length: int, generated: int, profiler: "profile | None" = None) -> tuple[float, Watch]:
        """Return the seconds from the first step to the last emission, and all emissions."""
        mailbox = Mailbox()
        watch = Watch(mailbox, count, profiler)
        started = self.drive([self.sequence(index, length, generated) for index in range(count)], mailbox, watch)
        return watch.stamps[-1][0] - started, watch

    def drive(
        self,
        asked: Iterable[Asked],
        mailbox: Mailbox,
        sink: Callable[[StepOutput], None],
        metrics: EngineMetrics | None = None,
    ) -> float:
        """Run the engine until `sink` closes the mailbox; return when the first step began."""
        settings = self.settings
        pool = BlockPool(self._blocks, caching=False)
        limits = Limits(
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            True,
            settings.block_size,
            prefill_budget(settings, self.runner),
            speculation(settings.speculative_config, self.runner),
        )
        metrics = metrics or EngineMetrics(CollectorRegistry())
        engine = Engine(mailbox, Scheduler(pool, limits), pool, self.runner, sink, metrics)
        for sequence in asked:
            mailbox.put(Add(sequence))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        engine.run()
        return started

    def sequence(self, index: int, length: int, generated: int) -> Asked:
        prompt = np.random.default_rng(index).integers(1000, 100000, length).tolist()
        request = Request(f"{index:016x}", "bench", 0, 0.0, self._sampling, Output(thinking=False))
        return build(Generate(request, pack_ids(prompt), generated, ()), 1, (), (), self.facts)

    def decode_ms(self, count: int) -> float:
        return self.run(count, PROMPT, GENERATED)[1].step_ms()

    def prefill_tok_s(self, count: int, length: int) -> float:
        self.run(count, length, 1)
        return count * length / statistics.median(self.run(count, length, 1)[0] for _ in range(3))

    def through_redis(self, counts: Sequence[int]) -> list[Passage]:
        loads = [engine_service.load_of(count, self._sampling) for count in counts]
        return engine_service.measure((self.runner, self._blocks), self.settings, self.facts, loads)

    def long_context(self, length: int) -> dict[str, float]:
        seconds, watch = self.run(1, length, GENERATED)
        first = next(at for at, tokens in watch.stamps if tokens)
        prefill_s = seconds - (watch.stamps[-1][0] - first)
        return {"prompt": length, "prefill_tok_s": round(length / prefill_s), "decode_ms": round(watch.step_ms(), 3)}

    def kernels(self, count: int) -> list[dict[str, Any]]:
        """Return the kernels of a decode step of `count` sequences, longest first."""
        profiler = profile(activities=[ProfilerActivity.CUDA])
        self.run(count, PROMPT, GENERATED, profiler)
        return table(profiler, PROFILED_STEPS)

    def prefill_kernels(self, count: int, length: int) -> list[dict[str, Any]]:
        """Return the kernels of a prefill, longest first."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.run(count, length, 1)
            torch.cuda.synchronize()
        return table(profiler, 1)


def table(profiler: profile, steps: int) -> list[dict[str, Any]]:
    rows = [
        {"kernel": event.key[:60], "us": event.self_device_time_total / steps, "launches": event.count / steps}
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])[:24]


def ceilings() -> dict[str, float]:
    """Measure the card's limits: a copy's bytes, read and written, and a large product's operations."""
    source = torch.randint(0, 255, (1 << 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_ms = triton.testing.do_bench(lambda: a @ b, return_mode="median")
    return {"copy_tb_s": 2 * source.nbytes / copy_ms / 1e9, "bf16_tflop_s": 2 * 8192**3 / product_ms / 1e9}


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def shapes(text: str) -> list[tuple[int, int]]:
    return [
        (int(count), int(length)) for count, _, length in (shape.partition("x") for shape in text.split(",")) if count
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="wint4,wint8,none", help="%(default)s; none is bf16")
    parser.add_argument("--batches", type=numbers, default="1,8,32,64,128,256", help="decode_ms (%(default)s)")
    parser.add_argument(
        "--prefills", type=shapes, default="1x1024,1x8192,16x1024,2x16384", help="prefill_tok_s (%(default)s)"
    )
    parser.add_argument("--redis", type=numbers, default="1,32,256", help="decode_ms_redis (%(default)s; '': without)")
    parser.add_argument(
        "--long-context", type=int, default=131_000, help="prompt of long_context in tokens (%(default)s; 0: without)"
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        default=131_072,
        help="of the engine, and how wide its block tables are (%(default)s)",
    )
    parser.add_argument(
        "--profile", type=numbers, default="1,32,128", help="decode_kernels, and with any prefill_kernels (%(default)s)"
    )
    parser.add_argument("--sampling", type=json.loads, default={}, help='of every request: {"temperature": 1.0, ...}')
    parser.add_argument("--sampling-class", choices=("base", "rejection"), default="rejection")
    parser.add_argument("--batch-invariant", action="store_true", help="the operations of that mode")
    parser.add_argument("--output", type=Path, help="the JSON file")
    return parser.parse_args()


def measure(bench: Bench, name: str, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure everything of one quantisation, into `result` and, line by line, to standard output."""
    bench.run(1, PROMPT, 4)  # compiles kernels that no captured step uses
    for batch in args.batches:
        result["decode_ms"][name][str(batch)] = ms = round(bench.decode_ms(batch), 3)
        print(f"{name} decode {batch:4d} {ms:8.3f} ms/step {1000 * batch / ms:9.0f} tok/s", flush=True)
    for count, length in args.prefills:
        result["prefill_tok_s"][name][f"{count}x{length}"] = rate = round(bench.prefill_tok_s(count, length))
        print(f"{name} prefill {count}x{length} {rate} tok/s", flush=True)
    for batch, passage in zip(args.redis, bench.through_redis(args.redis) if args.redis else (), strict=True):
        result["decode_ms_redis"][name][str(batch)] = passage.step_ms
        result["delta_ms_redis"][name][str(batch)] = passage.delta_ms
        print(f"{name} with Redis {batch:4d} {passage.step_ms:8.3f} ms/step, delta {passage.delta_ms} ms", flush=True)
    if args.long_context:
        result["long_context"][name] = bench.long_context(args.long_context)
        print(f"{name} long context {json.dumps(result['long_context'][name])}", flush=True)
    for batch in args.profile:
        result["decode_kernels"][name][str(batch)] = bench.kernels(batch)
    if args.profile and args.prefills:
        result["prefill_kernels"][name]["1x8192"] = bench.prefill_kernels(1, 8192)


PARTS = ("decode_ms", "prefill_tok_s", "decode_ms_redis", "delta_ms_redis", "decode_kernels", "prefill_kernels")


def main() -> None:
    args = parse()
    sampling = Sampling(**{"seed": 0, "temperature": 0.0, "ignore_eos": True, **args.sampling})
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "ceilings": ceilings(),
    }
    if args.batch_invariant:
        result["batch_invariant"] = True
    if args.sampling:
        result["sampling"] = {**args.sampling, "class": args.sampling_class}
    result.update({part: {} for part in (*PARTS, "long_context", "memory", "startup_s")})
    for quantization in args.quantization.split(","):
        torch.cuda.empty_cache()
        name = "bf16" if quantization == "none" else quantization
        bench = Bench(
            quantization, args.max_model_len, sampling, args.sampling_class, batch_invariant=args.batch_invariant
        )
        result["memory"][name], result["startup_s"][name] = bench.memory, bench.startup_s
        print(name, json.dumps(bench.startup_s), json.dumps(bench.memory), flush=True)
        result.update({part: result[part] | {name: {}} for part in PARTS})
        measure(bench, name, args, result)
        del bench
        if args.output is not None:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
