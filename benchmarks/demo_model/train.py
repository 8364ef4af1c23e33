"""Trains the demo checkpoint: python -m benchmarks.demo_model.train --tokenizer DIR --out DIR.

Stops after `--minutes` or at the last step and writes its whole state to `--out`, from which `--resume` goes on.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.demo_model.batches import Batch, Steps, to_device
from benchmarks.demo_model.config import hub_config
from benchmarks.demo_model.model import Model, answer_logits, balance, build
from benchmarks.demo_model.muon import Muon, adamw, split

STATE_BYTES = 15 << 20  # in one file of the state
FAR = 1_000_000  # steps nobody reaches
PACE = (50, 150)  # between which steps of a run its pace is measured


def main(arguments: list[str]) -> None:
    """Train."""
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every shape, and every batch has its own
    trainer = Trainer(options, device)
    trainer.run()


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="a state to go on from")
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights to begin with")
    parser.add_argument("--seed", type=int, default=1, help="of weights and samples")
    parser.add_argument("--steps", type=int, default=8000, help="of the whole training; 0: what fits into the minutes")
    parser.add_argument("--until", type=int, help="the step after which this run stops")
    parser.add_argument("--phase", type=int, default=0, help="whose mix of samples to draw")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this run")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay-steps", type=int, default=3000, help="the last steps, in which rates fall to 0")
    parser.add_argument("--samples", type=int, default=1024, help="in a step")
    parser.add_argument("--tokens", type=int, default=131072, help="in one batch, padding included")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--eval-steps", type=int, default=6)
    return parser.parse_args(arguments)


class Trainer:
    """One run."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options, self._device = options, device
        self._model = build(hub_config(), options.seed).train()
        self._model.to(device)
        inner, outer = split(self._model)
        self._muon = Muon(inner, options.muon_lr, 0.95, 0.01)
        self._adam = adamw(outer, options.adam_lr)
        self._step = 0
        if options.resume:
            self._load(options.resume)
        elif options.start:
            self._model.load_state_dict(Model.from_pretrained(options.start, config=self._model.config).state_dict())
        self._first = self._step
        options.out.mkdir(parents=True, exist_ok=True)
        self._log = (options.out / "train.jsonl").open("a")

    def run(self) -> None:
        """Train until the time is over or the last step is done."""
        options, started = self._options, time.monotonic()
        count = sum(p.numel() for p in self._model.parameters())
        self._say(parameters=count, **{k: str(v) for k, v in vars(options).items()})
        held_out = list(self._loader(options.eval_steps, held_out=True, workers=min(options.workers, 6)))
        self._say(event="held-out set is there", seconds=round(time.monotonic() - started, 1))
        window: dict[str, Any] = defaultdict(float)
        begun = time.monotonic()
        for batches in self._loader(options.steps or FAR, held_out=False, workers=options.workers):
            window["wait"] += time.monotonic() - begun
            loss, tokens = self._train_step(batches)
            window["loss"] += loss
            window["tokens"] += tokens
            window["steps"] += 1
            if self._step % 50 == 0:
                self._report(window)
            self._plan(started)
            begun = time.monotonic()
            if begun - started > options.minutes * 60 or self._step in (options.steps, options.until):
                break
            if self._step % options.eval_every == 0:
                self.evaluate(held_out)
                self._save(options.out)
                begun = time.monotonic()
        self.evaluate(held_out)
        self._save(options.out)

    def _plan(self, started: float) -> None:
        """With no number of steps given: once the pace is known, set it so that rates reach 0 when the time is over."""
        options, now = self._options, time.monotonic()
        done = self._step - self._first
        if done == PACE[0]:
            self._paced = now
        elif done == PACE[1] and not options.steps:
            pace = (PACE[1] - PACE[0]) / (now - self._paced)
            left = options.minutes * 60 - (now - started) - 10
            options.steps = self._step + int(pace * left * 0.96)
            options.decay_steps = options.steps - self._step
            self._say(event="planned", steps=options.steps, decay_steps=options.decay_steps)

    def _report(self, window: dict[str, Any]) -> None:
        loss = float(window["loss"]) / window["steps"]
        now = time.monotonic()
        elapsed = now - window.get("since", now)
        rate = window["tokens"] / elapsed if elapsed else 0
        self._say(
            step=self._step,
            loss=round(loss, 4),
            tokens_per_s=round(rate),
            steps_per_s=round(window["steps"] / elapsed, 2) if elapsed else 0,
            waited=round(window["wait"], 2),
            memory=round(torch.cuda.max_memory_allocated() / 2**30, 1) if self._device.type == "cuda" else 0,
        )
        if not math.isfinite(loss):
            raise SystemExit("the loss is not finite")
        window.clear()
        window["since"] = now

    def _loader(self, steps: int, *, held_out: bool, workers: int) -> Iterator[list[Batch]]:
        options = self._options
        first = 0 if held_out else self._step
        data = Steps(
            options.tokenizer,
            options.seed,
            steps,
            samples=options.samples,
            tokens=options.tokens,
            held_out=held_out,
            phase=options.phase,
        )
        yield from DataLoader(
            data,
            batch_size=None,
            sampler=range(first, steps),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self._device.type == "cuda",
        )

    def _train_step(self, batches: list[Batch]) -> tuple[Tensor, int]:
        count = sum(len(batch["labels"]) for batch in batches)
        total = torch.zeros((), device=self._device)
        for host in batches:
            batch = to_device(host, self._device)
            with self._autocast():
                logits = answer_logits(self._model, batch)
            loss = F.cross_entropy(logits.float(), batch["labels"], reduction="sum") / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self._update()
        return total, sum(len(batch["text"]) + len(batch["vision"]) for batch in batches)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda")

    def _update(self) -> None:
        scale = self._scale()
        torch.nn.utils.clip_grad_norm_([p for g in self._adam.param_groups for p in g["params"]], 1.0)
        for group in self._adam.param_groups:
            group["lr"] = self._options.adam_lr * scale
        self._adam.step()
        self._muon.step(scale)
        self._model.zero_grad(set_to_none=True)
        balance(self._model, 1e-3 * scale)
        self._step += 1

    def _scale(self) -> float:
        """Warm-up, a plateau, then down to zero in a line."""
        options = self._options
        if not options.steps:
            return float(min(1.0, (self._step + 1) / options.warmup))
        left = (options.steps - self._step) / options.decay_steps
        return float(max(0.0, min(1.0, (self._step + 1) / options.warmup, left)))

    @torch.no_grad()
    def evaluate(self, held_out: list[list[Batch]]) -> None:
        """The share of held-out samples of each kind whose every token is the likeliest one: greedy gets them right."""
        self._model.eval()
        right: dict[str, list[bool]] = defaultdict(list)
        losses: list[float] = []
        for host in (batch for batches in held_out for batch in batches):
            batch = to_device(host, self._device)
            with self._autocast():
                logits = answer_logits(self._model, batch)
            losses.append(F.cross_entropy(logits.float(), batch["labels"]).item())
            hits = (logits.argmax(-1) == batch["labels"]).long()
            worst = torch.ones(len(host["kinds"]), dtype=torch.long, device=self._device)
            worst = worst.scatter_reduce(0, batch["owners"], hits, "amin")
            for kind, hit in zip(host["kinds"], worst.tolist(), strict=True):
                right[kind].append(bool(hit))
        self._model.train()
        scores = {kind: f"{sum(hits) / len(hits):.3f} of {len(hits)}" for kind, hits in sorted(right.items())}
        self._say(
            step=self._step, held_out_loss=round(sum(losses) / len(losses), 4), exact=scores, load=self._load_range()
        )

    def _load_range(self) -> list[float]:
        """The smallest and largest bias of any expert: the balance that was needed."""
        biases = [p for name, p in self._model.named_parameters() if "e_score_correction_bias" in name]
        return [round(min(b.min().item() for b in biases), 3), round(max(b.max().item() for b in biases), 3)]

    def _say(self, **facts: object) -> None:
        line = json.dumps(facts)
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()

    def _save(self, directory: Path) -> None:
        tensors = {
            f"model.{name}": p.detach() for name, p in self._model.named_parameters() if name != "lm_head.weight"
        }
        tensors |= {f"muon.{i}": each for i, each in enumerate(self._muon.state())}
        for i, state in self._adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        tensors["step"] = torch.tensor(self._step)
        shards: list[dict[str, Tensor]] = [{}]
        for name, tensor in tensors.items():
            if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > STATE_BYTES:
                shards.append({})
            shards[-1][name] = tensor.cpu().contiguous()
        for i, shard in enumerate(shards):
            save_file(shard, directory / f"state-{i}.safetensors")
        self._say(event="saved", step=self._step)

    def _load(self, directory: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for file in sorted(directory.glob("state-*.safetensors")):
            tensors |= load_file(file, device=str(self._device))
        self._step = int(tensors.pop("step"))
        load_weights(self._model, tensors)
        self._muon.load([tensors[f"muon.{i}"] for i in range(len(self._muon.buffers))])
        state = self._adam.state_dict()
        count = len(state["param_groups"][0]["params"])
        names = ("exp_avg", "exp_avg_sq", "step")
        state["state"] = {i: {name: tensors[f"adam.{i}.{name}"] for name in names} for i in range(count)}
        self._adam.load_state_dict(state)


def load_weights(model: Model, tensors: dict[str, Tensor]) -> None:
    """Set the model's parameters from a state that a run has saved."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "lm_head.weight":
                parameter.copy_(tensors[f"model.{name}"])


if __name__ == "__main__":
    main(sys.argv[1:])
