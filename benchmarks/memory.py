"""The launch on one card of 24 GB, emulated on a larger one: memory of engine and vision tower, and what is left.

    python -m benchmarks.memory [--gib 23.65] [--encoder-first] [--output FILE.json]

As on one RTX 4090: wint4, a context of 32,768, 32 sequences, steps of 16,384 tokens, a share of 0.9, and the tower as
a process of its own on the same card. The engine's process is limited to `--gib` of the device and takes that for all
of it; weights are drawn. Then 32 sequences run at once, as long as the cache has room for, and one of nearly 32,768
tokens, while the tower encodes the largest image over and over. Needs a minute of a CUDA device of its own.

Printed, in GiB: weights, what the cache was given, the most that the engine's process and the device held, with
contexts, and `left`, which is the card less that: where it is above 0, the launch fits. Asserts nothing.
"""

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch

from benchmarks.engine import CONFIG, Bench
from benchmarks.steps import GENERATED
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD, Patches
from services.mm_encoder.vision.encoder import Encoder
from services.mm_encoder.vision.memory import device_bytes
from services.mm_encoder.vision.weights import load_weights
from shared.errors import ConfigError
from shared.messages import Sampling
from shared.model.drawn_weights import DrawnWeights

GIB = 2**30
GRID = (1, 240, 272)  # 12,794,880 pixels: the largest image of FastDeploy's launch has 12,845,056
LARGEST = 12_845_056 // 14**2  # patches
PASS = 32_768  # patches: the encoder's default
SEQUENCES, CONTEXT, SHARE = 32, 32_768, 0.9


def tower(pipe: Connection, card: int) -> None:
    """Run the encoder's process as on a card of so many bytes: load, report that, and encode an image at each message;
    False ends it."""
    weights = load_weights(DrawnWeights(torch.device("cpu")), CONFIG, "cuda")
    encoder = Encoder(weights, CONFIG, "cuda", PASS, CLIP_MEAN, CLIP_STD, card_bytes=card)
    pixels = CONFIG.vision.in_channels * CONFIG.vision.patch_size**2
    rows = np.random.default_rng(0).integers(0, 256, (GRID[1] * GRID[2], pixels), np.uint8)
    pipe.send(0.0)
    while pipe.recv():
        started = time.perf_counter()
        encoder.encode([Patches(rows, GRID)])
        pipe.send(time.perf_counter() - started)


class Tower:
    """The encoder's process, as the engine's process sees it."""

    def __init__(self, card: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=tower, args=(theirs, card), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def encode(self) -> float:
        """Return the seconds of one image; raises EOFError if the process ended, most likely out of memory."""
        self._pipe.send(True)
        return float(self._pipe.recv())

    def encode_until(self, over: Event, seconds: list[float]) -> None:
        while not over.is_set():
            seconds.append(self.encode())

    def end(self) -> None:
        self._pipe.send(False)
        self._process.join()


def used() -> int:
    """Return the bytes of the device that any process holds."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(card: int, encoder_first: bool) -> dict[str, Any]:
    """Measure the launch on a card of `card` bytes.

    Raises:
        ConfigError: the cache could not hold one context.
    """
    torch.cuda.set_per_process_memory_fraction(card / torch.cuda.mem_get_info()[1])
    foreign = device_bytes(CONFIG, LARGEST)
    encoder = Tower(card) if encoder_first else None
    greedy = Sampling(seed=0, temperature=0.0, ignore_eos=True)
    bench = Bench("wint4", CONTEXT, greedy, max_num_seqs=SEQUENCES, gpu_memory_utilization=SHARE, foreign_bytes=foreign)
    alone = used()
    encoder = encoder or Tower(card)
    loaded = used()
    over, images = Event(), list[float]()
    busy = Thread(target=encoder.encode_until, args=(over, images))
    busy.start()
    tokens = int(bench.memory["cache_tokens"])
    prompt = min(tokens // SEQUENCES // 64 * 64, CONTEXT) - GENERATED
    many, _ = bench.run(SEQUENCES, prompt, GENERATED)
    one, _ = bench.run(1, CONTEXT - GENERATED, GENERATED)
    over.set()
    busy.join()
    most = used()
    encoder.end()
    theirs = most - used()
    return {
        "card_gib": card / GIB,
        "foretold_of_the_tower_gib": foreign / GIB,
        "engine": bench.memory | {"peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB},
        "used_gib": {
            "after the engine's start": alone / GIB,
            "with the tower loaded": loaded / GIB,
            "while all works": most / GIB,
            "of that the tower": theirs / GIB,
        },
        "left_gib": (card - most) / GIB,
        "sequences": {"at once": SEQUENCES, "prompt": prompt, "seconds": many, "of one full context": one},
        "image_s": {"first": images[0], "last": images[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gib", type=float, default=23.65, help="of the card, as CUDA counts an RTX 4090's (%(default)s)"
    )
    parser.add_argument("--encoder-first", action="store_true", help="start the tower before the engine, not after it")
    parser.add_argument("--output", type=Path, help="the JSON file")
    args = parser.parse_args()
    try:
        result = measure(int(args.gib * GIB), args.encoder_first)
    except ConfigError as error:
        raise SystemExit(f"the launch does not fit: {error}") from None
    text = json.dumps(result, indent=1)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
