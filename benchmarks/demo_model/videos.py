"""Short videos of eight frames: something moves, blinks, adds up, or a number counts."""

import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.demo_model import draw
from benchmarks.demo_model.sample import VIDEO_FPS, Pixels, Sample, user
from benchmarks.demo_model.scenes import a, plural, there_are
from services.mm_encoder.media.timestamps import font_size, paint

FRAMES = 8
TIMES = ("", "once", "twice", "three times", "four times")
Made = tuple[str, str, list[Image.Image], str, str, str]  # kind, key, frames, question, reasoning, answer


def generate(rng: random.Random, size: draw.Size) -> Sample:
    """A video and a question about what happens in it."""
    kind, key, frames, asked, reasoning, answer = rng.choice(_KINDS)(rng, size)
    return Sample(kind, key, user([draw.pixels(frame) for frame in frames], asked), answer, reasoning)


def stamped(frames: list[Pixels]) -> list[Pixels]:
    """The frames as the encoder shows them, with the time painted on each (to the rounding of one blend)."""
    height, width = frames[0].shape[:2]
    made = []
    for i, frame in enumerate(frames):
        ink, cover = _stamp(i, width, height)
        made.append(np.where(cover < 1, frame * (1 - cover) + ink, ink).round().astype(np.uint8))
    return made


@lru_cache(maxsize=256)
def _stamp(frame: int, width: int, height: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The painted time as ink and its opacity: seen on black, and against what is left of white."""
    on_black, on_white = Image.new("RGB", (width, height)), Image.new("RGB", (width, height), (255, 255, 255))
    for image in (on_black, on_white):
        paint(image, frame / VIDEO_FPS, draw.font("Regular", font_size(width, height)))
    ink, white = np.asarray(on_black, np.float32), np.asarray(on_white, np.float32)
    return ink, (1 - (white - ink) / 255).astype(np.float32)


def _moves(rng: random.Random, size: draw.Size) -> Made:
    colour, kind = rng.choice(sorted(draw.COLOURS)), rng.choice(draw.SHAPES)
    direction = rng.choice(("to the left", "to the right", "up", "down"))
    fill, paper = draw.shade(rng, colour), draw.background(rng)
    width, height = 2 * size[0], 2 * size[1]
    radius = min(width, height) * rng.uniform(0.12, 0.2)
    low, high = rng.uniform(0.0, 0.25), rng.uniform(0.75, 1.0)
    across = rng.uniform(0.2, 0.8)
    frames = []
    for i in range(FRAMES):
        along = low + (high - low) * i / (FRAMES - 1)
        along = 1 - along if direction in ("to the left", "up") else along
        x, y = (along, across) if direction.startswith("to") else (across, along)
        image = draw.canvas(size, paper)
        draw.shape(
            ImageDraw.Draw(image),
            kind,
            radius + x * (width - 2 * radius),
            radius + y * (height - 2 * radius),
            radius,
            fill,
        )
        frames.append(image)
    asked = rng.choice(
        (
            "What happens in the video?",
            f"In which direction does the {kind} move?",
            f"Where does the {colour} {kind} go?",
            "Which way does it move?",
        )
    )
    reasoning = f"I see {a(colour)} {kind}. From frame to frame it is further {direction.removeprefix('to the ')}."
    return (
        "video motion",
        f"{colour} {kind} {direction} {low:.2f} {across:.2f}",
        frames,
        asked,
        reasoning,
        f"The {colour} {kind} moves {direction}.",
    )


def _blinks(rng: random.Random, size: draw.Size) -> Made:
    colour, kind = rng.choice(sorted(draw.COLOURS)), rng.choice(draw.SHAPES)
    shown = _blink_pattern(rng)
    times = sum(on and (i == 0 or not shown[i - 1]) for i, on in enumerate(shown))
    fill, paper = draw.shade(rng, colour), draw.background(rng)
    width, height = 2 * size[0], 2 * size[1]
    radius = min(width, height) * rng.uniform(0.15, 0.3)
    x, y = width * rng.uniform(0.35, 0.65), height * rng.uniform(0.4, 0.65)
    frames = []
    for on in shown:
        image = draw.canvas(size, paper)
        if on:
            draw.shape(ImageDraw.Draw(image), kind, x, y, radius, fill)
        frames.append(image)
    asked = rng.choice((f"How many times does the {kind} appear?", f"How often does the {colour} {kind} appear?"))
    pattern = ", ".join("on" if on else "off" for on in shown)
    return (
        "video count",
        f"{colour} {kind} {pattern}",
        frames,
        asked,
        f"Frame by frame the {kind} is {pattern}.",
        f"The {kind} appears {TIMES[times]}.",
    )


def _blink_pattern(rng: random.Random) -> list[bool]:
    while True:
        shown = [rng.random() < 0.5 for _ in range(FRAMES)]
        if any(shown):
            return shown


def _adds(rng: random.Random, size: draw.Size) -> Made:
    colour, kind = rng.choice(sorted(draw.COLOURS)), rng.choice(draw.SHAPES)
    count = rng.randint(1, 6)
    arrivals = sorted(rng.sample(range(FRAMES), count))
    cells = rng.sample([(row, column) for row in range(2) for column in range(3)], count)
    fill, paper = draw.shade(rng, colour), draw.background(rng)
    wide, tall = 2 * size[0] / 3, (2 * size[1] - 24) / 2
    radius = min(wide, tall) * rng.uniform(0.3, 0.42)
    frames = []
    for i in range(FRAMES):
        image = draw.canvas(size, paper)
        for arrival, (row, column) in zip(arrivals, cells, strict=True):
            if i >= arrival:
                draw.shape(ImageDraw.Draw(image), kind, (column + 0.5) * wide, 24 + (row + 0.5) * tall, radius, fill)
        frames.append(image)
    asked = rng.choice(
        (f"How many {plural(kind, 2)} are there at the end?", f"How many {plural(kind, 2)} does the video end with?")
    )
    steps = ", ".join(str(sum(arrival <= i for arrival in arrivals)) for i in range(FRAMES))
    return (
        "video count",
        f"{colour} {kind} {arrivals} {cells}",
        frames,
        asked,
        f"The number in each frame: {steps}.",
        there_are(count, kind),
    )


def _counter(rng: random.Random, size: draw.Size) -> Made:
    first, step = rng.randint(0, 60), rng.choice((1, 1, 1, 2, -1))
    if step < 0:
        first += FRAMES
    every = rng.choice((1, 2, 2))
    values = [first + step * (i // every) for i in range(FRAMES)]
    ink, paper = draw.shade(rng, rng.choice(("black", "blue", "red", "purple"))), draw.background(rng)
    face, height = rng.choice(draw.FACES), int(2 * min(size) * rng.uniform(0.35, 0.55))
    x, y = 2 * size[0] * rng.uniform(0.1, 0.3), 2 * size[1] * rng.uniform(0.22, 0.4)
    frames = []
    for value in values:
        image = draw.canvas(size, paper)
        ImageDraw.Draw(image).text((x, y), str(value), font=draw.font(face, height), fill=ink)
        frames.append(image)
    asked, answer = rng.choice(
        (
            ("What is the last number?", f"The last number is {values[-1]}."),
            ("Which number does the counter start at?", f"It starts at {values[0]}."),
            (
                "What does the counter do?",
                f"It counts {'up' if step > 0 else 'down'} from {values[0]} to {values[-1]}.",
            ),
            (
                "How many different numbers does the video show?",
                f"It shows {len(set(values))} different numbers.",
            ),
        )
    )
    listing = ", ".join(str(value) for value in dict.fromkeys(values))
    return "video count", f"counter {values}", frames, asked, f"The numbers are {listing}.", answer


_KINDS: tuple[Callable[[random.Random, draw.Size], Made], ...] = (_moves, _blinks, _adds, _counter)
