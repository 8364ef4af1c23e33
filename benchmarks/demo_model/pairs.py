"""Two pictures in one prompt, compared."""

import random
from collections.abc import Callable

from benchmarks.demo_model import draw, words
from benchmarks.demo_model.sample import Sample, user
from benchmarks.demo_model.scenes import NUMBERS, Scene, Thing, a, plural, scene, yes_or_no

Asked = tuple[str, str, str]  # question, reasoning, answer


def generate(rng: random.Random, size: draw.Size) -> Sample:
    """Two scenes, or two words, and what they have in common or not."""
    return _words(rng, size) if rng.random() < 0.2 else _scenes(rng, size)


def _words(rng: random.Random, size: draw.Size) -> Sample:
    first = words.word(rng)
    second = first if rng.random() < 0.4 else words.word(rng)
    asked = rng.choice(("Do both pictures show the same word?", "Is it the same word in both pictures?"))
    same = first == second
    answer = f'Yes, both say "{first}".' if same else f'No, the first says "{first}" and the second says "{second}".'
    reasoning = f"Picture 1 says {', '.join(first)}. Picture 2 says {', '.join(second)}."
    pictures = (words.paint(rng, size, first), words.paint(rng, size, second))
    return Sample("pair", f"{first} {second}", user(*pictures, asked), answer, reasoning)


def _scenes(rng: random.Random, size: draw.Size) -> Sample:
    which = rng.randrange(4)
    low = 1 if which == 0 else rng.randint(1, 2)
    first = scene(rng, size, rng.randint(1, 4) if which == 0 else low)
    second = scene(rng, size, rng.randint(1, 4) if which == 0 else low)
    asked, reasoning, answer = (_more, _same_colour, _which_shows, _same_kind)[which](rng, first, second)
    return Sample("pair", f"{first.key}|{second.key}", user(first.pixels, second.pixels, asked), answer, reasoning)


def _seen(first: str, second: str, detail: str = "") -> str:
    return f"Picture 1 shows {first}. Picture 2 shows {second}.{detail}"


def _names(scene: Scene) -> str:
    return ", ".join(a(t.name) for t in scene.things)


def _checked(scene: Scene, wanted: Callable[[Thing], bool]) -> str:
    return ", ".join(f"{a(t.name)}: {yes_or_no(wanted(t))}" for t in scene.things)


def _more(rng: random.Random, first: Scene, second: Scene) -> Asked:
    asked = rng.choice(("Which picture has more shapes?", "In which picture are more shapes?"))
    one, two = len(first.things), len(second.things)
    reasoning = _seen(_names(first), _names(second), f" That is {one} and {two}.")
    if one == two:
        return asked, reasoning, f"Both have {NUMBERS[one]} {plural('shape', one)}."
    winner, most, least = ("first", one, two) if one > two else ("second", two, one)
    return asked, reasoning, f"The {winner} picture has more: {NUMBERS[most]} against {NUMBERS[least]}."


def _same_colour(rng: random.Random, first: Scene, second: Scene) -> Asked:
    return _common(rng, first, second, "colour")


def _same_kind(rng: random.Random, first: Scene, second: Scene) -> Asked:
    return _common(rng, first, second, "kind")


def _common(rng: random.Random, first: Scene, second: Scene, what: str) -> Asked:
    ones = {getattr(t, what) for t in first.things}
    both = list(dict.fromkeys(getattr(t, what) for t in second.things if getattr(t, what) in ones))
    noun = "colour" if what == "colour" else "kind of shape"
    asked = rng.choice((f"Is there a {noun} that is in both pictures?", f"Do the pictures have a {noun} in common?"))
    reasoning = _seen(_names(first), _checked(second, lambda t: getattr(t, what) in ones))
    answer = f"Yes: {' and '.join(both)}." if both else f"No, there is no {noun} in both."
    return asked, reasoning, answer


def _which_shows(rng: random.Random, first: Scene, second: Scene) -> Asked:
    ones, twos = {t.name for t in first.things}, {t.name for t in second.things}
    name = rng.choice(sorted(ones | twos))
    asked = rng.choice((f"Which picture shows {a(name)}?", f"In which picture is {a(name)}?"))
    reasoning = _seen(*(_checked(scene, lambda t: t.name == name) for scene in (first, second)))
    if name in ones and name in twos:
        return asked, reasoning, "Both pictures show it."
    return asked, reasoning, f"The {'first' if name in ones else 'second'} picture shows it."
