"""The vision tower at the published size, beside transformers' in the same run.

    python -m benchmarks.encoder [--output FILE.json] [--only NAME ...]

Both have the same drawn weights in bfloat16, and end with the resampler. Ours is timed from bytes in the host's memory
to embeddings in the host's memory, as the service calls it; transformers' (scaled dot product attention) from numbers
that are on the device already to embeddings that stay there. Timed in turns; a figure is the median. Needs a CUDA
device and transformers, which the tests' environment has; asserts nothing. With --output the figures are kept as JSON:

  cases.<name>     patches, ours_ms, transformers_ms, ratio of these, and difference: the norm of the difference of both
                   results by that of transformers'
  device, versions, date
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import triton
from torch import Tensor
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as published

from benchmarks.engine import CONFIG
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD, Grid, Patches
from services.mm_encoder.vision.encoder import Encoder
from services.mm_encoder.vision.normalise import normalise
from services.mm_encoder.vision.weights import load_weights
from shared.model.config import ModelConfig
from shared.model.drawn_weights import DrawnWeights

CASES: dict[str, tuple[list[Grid], int]] = {  # grids, and how often each is timed
    "448 x 448": ([(1, 32, 32)], 21),
    "8 of 448 x 448": ([(1, 32, 32)] * 8, 11),
    "1080p": ([(1, 78, 138)], 7),
    "8 of 1080p": ([(1, 78, 138)] * 8, 3),
    "12.8 megapixels": ([(1, 240, 272)], 3),
    "60 s of 720p, 2 frames/s": ([(120, 52, 92)], 3),
}
PASS = 32_768  # patches: the encoder's default
OURS = {"vision_tower.": "vision_model.", "resampler_model.": "model.resampler_model."}  # names by transformers' prefix
MERGER = {"fc1": "0", "fc2": "2", "ln": "3"}


class Published:
    """Tower and resampler of transformers, with drawn weights."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        vision = {
            name: getattr(config.vision, name) for name in ("depth", "hidden_size", "num_heads", "intermediate_size")
        }
        theirs = transformers.Ernie4_5_VLMoeConfig(
            text_config={"hidden_size": config.hidden_size, "rms_norm_eps": config.norm_eps}, vision_config=vision
        )
        theirs._attn_implementation = "sdpa"
        with torch.device(device):
            tower: Any = published.Ernie4_5_VLMoeVisionTransformerPretrainedModel
            self._tower = tower._from_config(theirs.vision_config, attn_implementation="sdpa", dtype=torch.bfloat16)
            self._resampler = published.Ernie4_5_VLMoeVariableResolutionResamplerModel(theirs).bfloat16()
        for prefix, module in (("vision_tower.", self._tower), ("resampler_model.", self._resampler)):
            module.load_state_dict({name: drawn(prefix + name, tensor) for name, tensor in module.state_dict().items()})

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, grids: list[Grid]) -> Tensor:
        sizes = torch.tensor(grids)
        rows: Tensor = self._resampler(self._tower(pixels, sizes.to(pixels.device)).last_hidden_state, sizes)
        return rows


def drawn(name: str, like: Tensor) -> Tensor:
    """Return the drawn weight that has a name of transformers'."""
    prefix = next(prefix for prefix in OURS if name.startswith(prefix))
    parts = name.removeprefix(prefix).split(".")
    if parts[0].endswith("_linear"):
        parts[1] = MERGER[parts[1]]
    return DrawnWeights(torch.device("cpu")).get(OURS[prefix] + ".".join(parts), tuple(like.shape)).to(like)


def milliseconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def measure(ours: Encoder, theirs: Published, grids: list[Grid], times: int) -> dict[str, Any]:
    """Time one case, ours and theirs in turns, after two of each."""
    chance = np.random.default_rng(0)
    items = [Patches(chance.integers(0, 256, (t * h * w, 588), np.uint8), (t, h, w)) for t, h, w in grids]
    rows = torch.from_numpy(np.concatenate([item.rows for item in items])).cuda()
    pixels = torch.cat([normalise(some, *statistics_of_pixels(), torch.bfloat16) for some in torch.split(rows, PASS)])
    runs = (lambda: ours.encode(items), lambda: theirs(pixels, grids))
    found, expected = torch.cat(ours.encode(items)).cuda(), theirs(pixels, grids)
    difference = float((found - expected).float().norm() / expected.float().norm())
    del found, expected
    for run in runs:
        run()
    timed = [[milliseconds(run) for run in runs] for _ in range(times)]
    our_ms, their_ms = (statistics.median(each) for each in zip(*timed, strict=True))
    return {
        "patches": len(rows),
        "ours_ms": our_ms,
        "transformers_ms": their_ms,
        "ratio": their_ms / our_ms,
        "difference": difference,
    }


def statistics_of_pixels() -> tuple[Tensor, Tensor]:
    return torch.tensor(CLIP_MEAN, device="cuda"), torch.tensor(CLIP_STD, device="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="of the cases")
    args = parser.parse_args()
    weights = load_weights(DrawnWeights(torch.device("cpu")), CONFIG, "cuda")
    ours = Encoder(weights, CONFIG, "cuda", PASS, CLIP_MEAN, CLIP_STD)
    theirs = Published(CONFIG, "cuda")
    cases = {}
    for name in args.only:
        cases[name] = case = measure(ours, theirs, *CASES[name])
        print(
            f"{name:26}{case['patches']:8} patches  ours {case['ours_ms']:8.1f} ms  transformers "
            f"{case['transformers_ms']:8.1f} ms  {case['ratio']:.2f} x  difference {case['difference']:.1e}",
            flush=True,
        )
    if args.output is not None:
        versions = {module.__name__: module.__version__ for module in (torch, triton, transformers)}
        date = datetime.now(UTC).date().isoformat()
        result = {"cases": cases, "device": torch.cuda.get_device_name(), "versions": versions, "date": date}
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
