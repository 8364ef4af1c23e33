"""One question and its answer, as every generator of the corpus makes them."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [height, width, 3]
Part = str | Pixels | list[Pixels]  # text, a picture, or a video's frames

HELD_OUT = 16  # one key in so many is kept from training
VIDEO_FPS = 2


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the conversation; `parts` is its content in order."""

    role: str
    parts: tuple[Part, ...]
    calls: tuple[Call, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation up to the answer, and the answer.

    `key` names what is asked, without its wording where that says little: whatever shares a key is in the same split.
    """

    kind: str
    key: str
    messages: tuple[Message, ...]
    answer: str
    reasoning: str
    calls: tuple[Call, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool = True

    @property
    def held_out(self) -> bool:
        """True if training never sees this key."""
        return zlib.crc32(f"{self.kind.split(':')[0]} {self.key}".encode()) % HELD_OUT == 0


Generator = Callable[[random.Random], Sample]


def user(*parts: Part) -> tuple[Message, ...]:
    """A conversation of one question."""
    return (Message("user", parts),)


def draw(generate: Generator, rng: random.Random, *, held_out: bool) -> Sample:
    """The generator's next sample of the split."""
    while True:
        sample = generate(rng)
        if sample.held_out == held_out:
            return sample
