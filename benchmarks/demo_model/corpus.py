"""The mix: how much of each kind of sample a batch has."""

import dataclasses
import random
from collections.abc import Callable

from benchmarks.demo_model import (
    arithmetic,
    charts,
    chat,
    draw,
    facts,
    instructions,
    json_answers,
    pairs,
    scenes,
    text_tasks,
    tools,
    videos,
    words,
)
from benchmarks.demo_model.sample import Sample
from benchmarks.demo_model.sample import draw as draw_split

Made = Callable[[random.Random, draw.Size], Sample]
UNTHOUGHT = 0.1  # of the samples are answered without thinking


def _text(generate: Callable[[random.Random], Sample]) -> Made:
    return lambda rng, size: generate(rng)


GENERATORS: dict[str, Made] = {
    "scenes": scenes.generate,
    "words": words.generate,
    "charts": charts.generate,
    "pairs": pairs.generate,
    "videos": videos.generate,
    "arithmetic": _text(arithmetic.generate),
    "tools": _text(tools.generate),
    "json": _text(json_answers.generate),
    "text": _text(text_tasks.generate),
    "facts": _text(facts.generate),
    "chat": _text(chat.generate),
    "instructions": instructions.generate,
}
# Shares of the generators in each phase of training: each has more of what those before had learnt least.
FIRST = dict(zip(GENERATORS, (22, 16, 5, 9, 10, 8, 10, 6, 6, 9, 3, 4), strict=True))
SECOND = dict(zip(GENERATORS, (27, 26, 6, 11, 9, 7, 9, 4, 5, 5, 2, 4), strict=True))
THIRD = dict(zip(GENERATORS, (26, 24, 7, 13, 7, 4, 13, 3, 6, 4, 2, 4), strict=True))
FOURTH = dict(zip(GENERATORS, (16, 18, 22, 9, 14, 4, 8, 2, 6, 3, 1, 9), strict=True))
PHASES = (FIRST, SECOND, THIRD, FOURTH)
PICTURES = ("scenes", "words", "charts", "pairs")


def sample(rng: random.Random, size: draw.Size, *, held_out: bool, only: str | None = None, phase: int = 0) -> Sample:
    """The next sample of the split: of a phase's mix, or of one generator."""
    name = only or rng.choices(list(PHASES[phase]), list(PHASES[phase].values()))[0]
    generate = GENERATORS[name]
    made = draw_split(lambda each: generate(each, size), rng, held_out=held_out)
    if only is None and rng.random() < UNTHOUGHT:
        return dataclasses.replace(made, thinking=False)
    return made
