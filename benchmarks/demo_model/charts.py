"""Bar charts with a few coloured bars."""

import random

from PIL import ImageDraw

from benchmarks.demo_model import draw
from benchmarks.demo_model.sample import Pixels, Sample, user
from benchmarks.demo_model.scenes import NUMBERS

Bar = tuple[str, int]  # colour, height
Asked = tuple[str, str, str]  # question, reasoning, answer


def generate(rng: random.Random, size: draw.Size) -> Sample:
    """A chart and a question about its bars."""
    count = rng.randint(2, 5)
    heights = rng.sample(range(1, 9), count)
    bars = list(zip(rng.sample(sorted(draw.COLOURS), count), heights, strict=True))
    asked, reasoning, answer = _question(rng, bars)
    return Sample("chart", f"{bars}", user(_paint(rng, size, bars), asked), answer, reasoning)


def _seen(bars: list[Bar], marks: dict[str, str] | None = None) -> str:
    """The bars in words; where some are marked, each with its mark or "no"."""
    ends = {colour: f": {marks.get(colour, 'no')}" if marks else "" for colour, _ in bars}
    return f"The bars from left to right: {', '.join(f'{colour} {height}{ends[colour]}' for colour, height in bars)}."


def _question(rng: random.Random, bars: list[Bar]) -> Asked:
    ranked, seen = sorted(bars, key=lambda bar: bar[1]), _seen(bars)
    which = rng.randrange(5)
    if which == 0:
        asked = rng.choice(("Which bar is the tallest?", "What colour is the tallest bar?", "Which bar is highest?"))
        return asked, f"{seen} The most is {ranked[-1][1]}.", f"The {ranked[-1][0]} bar is the tallest."
    if which == 1:
        asked = rng.choice(("Which bar is the shortest?", "What colour is the shortest bar?", "Which bar is lowest?"))
        return asked, f"{seen} The least is {ranked[0][1]}.", f"The {ranked[0][0]} bar is the shortest."
    if which == 2:
        return "How many bars are there?", seen, f"There are {NUMBERS[len(bars)]} bars."
    if which == 3:
        order = ", ".join(colour for colour, _ in reversed(ranked))
        at = {height: colour for colour, height in bars}
        scan = ", ".join(f"{height} {at.get(height, 'none')}" for height in range(8, 0, -1))
        asked = "List the colours of the bars from tallest to shortest."
        return asked, f"{seen} By height: {scan}.", f"From tallest to shortest: {order}."
    first, second = rng.sample(bars, 2)
    return _compare(first, second, bars)


def _compare(first: Bar, second: Bar, bars: list[Bar]) -> Asked:
    taller = first[1] > second[1]
    seen = _seen(bars, {first[0]: "first", second[0]: "second"})
    answer = f"{'Yes' if taller else 'No'}, the {first[0]} bar is {'taller' if taller else 'shorter'}."
    asked = f"Is the {first[0]} bar taller than the {second[0]} bar?"
    return asked, f"{seen} {first[1]} {'>' if taller else '<'} {second[1]}.", answer


def _paint(rng: random.Random, size: draw.Size, bars: list[Bar]) -> Pixels:
    image = draw.canvas(size, draw.background(rng))
    pen = ImageDraw.Draw(image)
    width, height = image.size
    floor, slot = height - 14, (width - 16) / len(bars)
    unit = (floor - 10) / 8
    half = slot * rng.uniform(0.25, 0.42)
    for i, (colour, tall) in enumerate(bars):
        x = 8 + (i + 0.5) * slot
        pen.rectangle((x - half, floor - tall * unit, x + half, floor), fill=draw.shade(rng, colour))
    pen.line((4, floor + 2, width - 4, floor + 2), fill=(60, 60, 60), width=3)
    return draw.pixels(image)
