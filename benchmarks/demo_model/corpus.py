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
UNTHOUGHT = 0.15  # of the samples are answered without thinking


def _text(generate: Callable[[random.Random], Sample]) -> Made:
    return lambda rng, size: generate(rng)


# Kind: its share of the samples, and its generator.
MIX: dict[str, tuple[float, Made]] = {
    "scenes": (22, scenes.generate),
    "words": (16, words.generate),
    "charts": (5, charts.generate),
    "pairs": (9, pairs.generate),
    "videos": (10, videos.generate),
    "arithmetic": (8, _text(arithmetic.generate)),
    "tools": (10, _text(tools.generate)),
    "json": (6, _text(json_answers.generate)),
    "text": (6, _text(text_tasks.generate)),
    "facts": (9, _text(facts.generate)),
    "chat": (3, _text(chat.generate)),
    "instructions": (4, instructions.generate),
}


def sample(rng: random.Random, size: draw.Size, *, held_out: bool, only: str | None = None) -> Sample:
    """The next sample of the split: of the mix, or of one kind."""
    kinds = list(MIX)
    kind = only or rng.choices(kinds, [MIX[name][0] for name in kinds])[0]
    generate = MIX[kind][1]
    made = draw_split(lambda each: generate(each, size), rng, held_out=held_out)
    if only is None and rng.random() < UNTHOUGHT:
        return dataclasses.replace(made, thinking=False)
    return made
