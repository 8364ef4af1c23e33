"""Sampling on a GPU, apart from the model: microseconds a step, by rows and by how flat their distributions are.

`sampled` is all that the sampler launches for rows with these limits, with the host's share and the read of the tokens;
the operations are timed alone. Needs a CUDA device; asserts nothing.
"""

import argparse
import json
from typing import Any

import msgspec
import numpy as np
import torch
import triton
from torch import Tensor

from services.engine.run.assembly import sampling_ops
from services.engine.run.sampler import Sampler
from services.engine.run.sampling_plan import SamplingPlan, heaviest
from services.engine.settings import SamplingClass

VOCABULARY = 103424
LIMITS = {"none": (0, 1.0), "top_p": (0, 0.9), "top_k": (50, 1.0), "both": (50, 0.9)}
CLASSES: tuple[SamplingClass, ...] = ("rejection", "base")


def us(run: Any) -> float:
    return round(1000 * float(triton.testing.do_bench(run, return_mode="median")), 1)


def measure(kind: SamplingClass, logits: Tensor, top_k: int, top_p: float) -> dict[str, float]:
    rows, device = len(logits), logits.device
    ops = sampling_ops(kind, on_gpu=True)
    probs, floor = torch.softmax(logits, dim=-1), torch.zeros(rows, device=device)
    ks, ps = torch.full((rows,), top_k, device=device), torch.full((rows,), top_p, dtype=torch.float64, device=device)
    least, numbers = ops.threshold(probs, floor, ks, ps), torch.rand(rows, dtype=torch.float64, device=device)
    nothing = SamplingPlan()
    plan = msgspec.structs.replace(
        heaviest(*logits.shape),
        top_k=np.full(rows, top_k, np.int64),
        top_p=np.full(rows, top_p, np.float64),
        min_p=np.zeros(rows, np.float32),
        masked_rows=nothing.masked_rows,
        masks=nothing.masks,
        wanted=nothing.wanted,
        logprobs=nothing.logprobs,
    )
    sampler = Sampler((2,), ops, device)
    return {
        "threshold": us(lambda: ops.threshold(probs, floor, ks, ps)),
        "pick": us(lambda: ops.pick(probs, least, numbers)),
        "copy": us(lambda: logits.clone()),
        # Includes a copy of the logits, as they are overwritten.
        "sampled": us(lambda: sampler.draw(logits.clone(), plan).read()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,32,256")
    parser.add_argument("--scales", default="0,1,3,8", help="standard deviations of the logits")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for rows in map(int, args.rows.split(",")):
        for scale in map(float, args.scales.split(",")):
            generator = torch.Generator("cuda").manual_seed(0)
            logits = torch.randn(rows, VOCABULARY, device="cuda", generator=generator) * scale
            for name, limits in LIMITS.items():
                for kind in CLASSES:
                    print(f"{rows:4d} rows, scale {scale:3.0f}, {name:5s} {kind:9s}", end=" ")
                    print(json.dumps(measure(kind, logits, *limits)), flush=True)


if __name__ == "__main__":
    main()
