"""Scenes: up to six coloured shapes in the cells of a grid, and what can be asked about them."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import ImageDraw

from benchmarks.demo_model import draw
from benchmarks.demo_model.sample import Pixels, Sample, user

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape: its colour, kind, and the row and column of its cell."""

    colour: str
    kind: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in reading order, as drawn."""

    things: tuple[Thing, ...]
    pixels: Pixels

    @property
    def key(self) -> str:
        return ",".join(f"{t.name} {t.row}{t.column}" for t in self.things)

    @property
    def listing(self) -> str:
        return ", ".join(f"{a(t.name)} {t.place}" for t in self.things)

    def checked(self, wanted: Callable[[Thing], bool]) -> str:
        """The listing with a word on each thing, so that the answer looks for "yes" and not for a name."""
        return ", ".join(f"{a(t.name)} {t.place}: {yes_or_no(wanted(t))}" for t in self.things)


def scene(rng: random.Random, size: draw.Size, count: int | None = None) -> Scene:
    """A scene of `count` things, else of one to six."""
    count = rng.randint(1, 6) if count is None else count
    cells = sorted(rng.sample([(row, column) for row in range(3) for column in range(3)], count))
    # Few colours and kinds make "how many red ones" worth asking.
    colours = rng.sample(sorted(draw.COLOURS), rng.randint(1, 4))
    kinds = rng.sample(draw.SHAPES, rng.randint(1, 4))
    things = tuple(Thing(rng.choice(colours), rng.choice(kinds), row, column) for row, column in cells)
    return Scene(things, paint(rng, size, things))


def paint(rng: random.Random, size: draw.Size, things: tuple[Thing, ...]) -> Pixels:
    """Draw the things, each somewhere in its cell."""
    image = draw.canvas(size, draw.background(rng))
    pen = ImageDraw.Draw(image)
    wide, tall = 2 * size[0] / 3, 2 * size[1] / 3
    for thing in things:
        radius = min(wide, tall) / 2 * rng.uniform(0.55, 0.92)
        x = (thing.column + 0.5) * wide + rng.uniform(-1, 1) * (wide / 2 - radius) * 0.8
        y = (thing.row + 0.5) * tall + rng.uniform(-1, 1) * (tall / 2 - radius) * 0.8
        draw.shape(pen, thing.kind, x, y, radius, draw.shade(rng, thing.colour))
    return draw.pixels(image)


def a(noun: str) -> str:
    """The noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(kind: str, count: int) -> str:
    """The noun for so many things."""
    return kind if count == 1 else kind + ("es" if kind == "cross" else "s")


def yes_or_no(true: bool) -> str:
    """The word for it."""
    return "yes" if true else "no"


def there_are(count: int, noun: str) -> str:
    """A sentence that gives a count."""
    if count == 0:
        return f"There are no {plural(noun, 0)}."
    return f"There {'is' if count == 1 else 'are'} {NUMBERS[count]} {plural(noun, count)}."


Asked = tuple[str, str, str, str]  # kind, question, reasoning, answer


def question(rng: random.Random, scene: Scene) -> Asked:
    """One of the questions that this scene can be asked."""
    while (asked := rng.choice(_QUESTIONS)(rng, scene)) is None:
        pass
    return asked


def _count_all(rng: random.Random, scene: Scene) -> Asked:
    asked = rng.choice(
        ("How many shapes are there?", "How many shapes do you see?", "Count the shapes.", "How many shapes?")
    )
    things = scene.things
    numbered = ", ".join(f"{i}: {t.name}" for i, t in enumerate(things, 1))
    return "scene count", asked, f"I count {numbered}.", there_are(len(things), "shape")


def _count_some(rng: random.Random, scene: Scene) -> Asked:
    by_colour = rng.random() < 0.5
    there = [t.colour if by_colour else t.kind for t in scene.things]
    wanted = rng.choice([*there, rng.choice(sorted(draw.COLOURS) if by_colour else draw.SHAPES)])
    found = [t for t in scene.things if wanted in (t.colour, t.kind)]
    noun = f"{wanted} shape" if by_colour else wanted
    asked = rng.choice(("How many {} are there?", "How many {} do you see?", "Count the {}."))
    listing = ", ".join(f"{a(t.name)} {t.place}: {found.index(t) + 1 if t in found else 'no'}" for t in scene.things)
    reasoning = f"I see {listing}. That is {len(found)}."
    return "scene count", asked.format(plural(noun, 2)), reasoning, there_are(len(found), noun)


def _colour(rng: random.Random, scene: Scene) -> Asked | None:
    lone = [t for t in scene.things if sum(u.kind == t.kind for u in scene.things) == 1]
    if not lone:
        return None
    thing = rng.choice(lone)
    asked = rng.choice(("What colour is the {}?", "Which colour does the {} have?", "What is the colour of the {}?"))
    reasoning = f"I see {scene.checked(lambda t: t.kind == thing.kind)}."
    return "scene colour", asked.format(thing.kind), reasoning, f"The {thing.kind} is {thing.colour}."


def _shape(rng: random.Random, scene: Scene) -> Asked | None:
    lone = [t for t in scene.things if sum(u.colour == t.colour for u in scene.things) == 1]
    if not lone:
        return None
    thing = rng.choice(lone)
    asked = rng.choice(("Which shape is {}?", "What shape is the {} one?", "What is the {} shape?"))
    reasoning = f"I see {scene.checked(lambda t: t.colour == thing.colour)}."
    return "scene shape", asked.format(thing.colour), reasoning, f"The {thing.colour} shape is a {thing.kind}."


def _where(rng: random.Random, scene: Scene) -> Asked | None:
    lone = [t for t in scene.things if sum(u.name == t.name for u in scene.things) == 1]
    if not lone:
        return None
    thing = rng.choice(lone)
    asked = rng.choice(("Where is the {}?", "In which part of the picture is the {}?", "Where do you see the {}?"))
    reasoning = f"I see {scene.checked(lambda t: t.name == thing.name)}."
    return "scene place", asked.format(thing.name), reasoning, f"The {thing.name} is {thing.place}."


def _what_at(rng: random.Random, scene: Scene) -> Asked:
    thing = rng.choice(scene.things)
    asked = rng.choice(("What is {}?", "What do you see {}?", "Which shape is {}?"))
    reasoning = f"I see {scene.checked(lambda t: t.place == thing.place)}."
    return "scene place", asked.format(thing.place), reasoning, f"{a(thing.name).capitalize()} is {thing.place}."


def _is_there(rng: random.Random, scene: Scene) -> Asked:
    names = {t.name for t in scene.things}
    name = rng.choice(sorted(names))
    if rng.random() < 0.5:
        name = f"{rng.choice(sorted(draw.COLOURS))} {rng.choice(draw.SHAPES)}"
    asked = rng.choice(("Is there {}?", "Do you see {}?", "Does the picture show {}?"))
    answer = f"Yes, there is {a(name)}." if name in names else f"No, there is no {name}."
    reasoning = f"I see {scene.checked(lambda t: t.name == name)}."
    return "scene presence", asked.format(a(name)), reasoning, answer


def _describe(rng: random.Random, scene: Scene) -> Asked:
    asked = rng.choice(
        ("Describe the picture.", "What is in this picture?", "What do you see?", "What does the picture show?")
    )
    count = len(scene.things)
    noun = plural("shape", count)
    return (
        "scene description",
        asked,
        f"I go through the picture row by row and find {NUMBERS[count]} {noun}.",
        f"The picture shows {NUMBERS[count]} {noun}: {scene.listing}.",
    )


_QUESTIONS: tuple[Callable[[random.Random, Scene], Asked | None], ...] = (
    _count_all,
    _count_all,
    _count_some,
    _count_some,
    _colour,
    _shape,
    _where,
    _what_at,
    _is_there,
    _describe,
)


def generate(rng: random.Random, size: draw.Size) -> Sample:
    """A scene and a question."""
    made = scene(rng, size)
    kind, asked, reasoning, answer = question(rng, made)
    parts = (made.pixels, asked) if rng.random() < 0.8 else (asked, made.pixels)
    return Sample(kind, made.key, user(*parts), answer, reasoning)
