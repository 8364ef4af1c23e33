"""Arithmetic with its steps written out."""

import random
from collections.abc import Callable

from benchmarks.demo_model.sample import Sample, user

Asked = tuple[str, str, str, str, int]  # kind, key, question, steps, result


def generate(rng: random.Random) -> Sample:
    """A calculation."""
    kind, key, asked, steps, result = rng.choices(_KINDS, (5, 3, 4, 2, 2, 3))[0](rng)
    return Sample(kind, key, user(asked), f"The answer is {result}.", steps)


def _ask(rng: random.Random, expression: str) -> str:
    return rng.choice(
        ("What is {}?", "{} = ?", "Calculate {}.", "How much is {}?", "Please work out {}.", "{}", "What does {} make?")
    ).format(expression)


def add_steps(a: int, b: int) -> str:
    """Column addition, ones first."""
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = ones // 10
    steps = f"Ones: {a % 10} + {b % 10} = {ones}. "
    if carry:
        return steps + f"Tens: {a // 10} + {b // 10} + 1 = {tens + 1}. Together {a + b}."
    return steps + f"Tens: {a // 10} + {b // 10} = {tens}. Together {a + b}."


def _sum(rng: random.Random) -> Asked:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    words = rng.choice((f"{a} + {b}", f"{a} + {b}", f"{a}+{b}", f"{a} plus {b}", f"the sum of {a} and {b}"))
    return "sum", f"{a}+{b}", _ask(rng, words), add_steps(a, b), a + b


def _difference(rng: random.Random) -> Asked:
    a, b = sorted((rng.randint(0, 99), rng.randint(0, 99)), reverse=True)
    words = rng.choice((f"{a} - {b}", f"{a}-{b}", f"{a} minus {b}"))
    middle = a - b // 10 * 10
    steps = f"{a} - {b // 10 * 10} = {middle}. {middle} - {b % 10} = {a - b}."
    return "difference", f"{a}-{b}", _ask(rng, words), steps, a - b


def _product(rng: random.Random) -> Asked:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    words = rng.choice(
        (f"{a} * {b}", f"{a}*{b}", f"{a} x {b}", f"{a} times {b}", f"{a} × {b}", f"the product of {a} and {b}")
    )
    asked = _ask(rng, words)
    # A hundred products are a table to learn, so it is the wording that is held out.
    return "product", asked, asked, f"{a} times {b} is {a * b}.", a * b


def _long_product(rng: random.Random) -> Asked:
    a, b = rng.randint(10, 99), rng.randint(2, 9)
    tens, ones = a // 10 * 10, a % 10
    words = rng.choice((f"{a} * {b}", f"{a} x {b}", f"{a} times {b}", f"{a} × {b}"))
    steps = f"{tens} times {b} is {tens * b}. {ones} times {b} is {ones * b}. {tens * b} + {ones * b} = {a * b}."
    return "long product", f"{a}*{b}", _ask(rng, words), steps, a * b


def _three(rng: random.Random) -> Asked:
    a, b, c = (rng.randint(1, 33) for _ in range(3))
    steps = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    return "sum of three", f"{a}+{b}+{c}", _ask(rng, f"{a} + {b} + {c}"), steps, a + b + c


_NAMES = ("Ana", "Ben", "Chloe", "David", "Emma", "Finn", "Grace", "Hugo", "Ida", "Jonas", "Kira", "Leo", "Mia", "Noah")
_THINGS = ("apples", "books", "coins", "pencils", "stamps", "marbles", "cards", "eggs", "shells", "tickets")


def _story(rng: random.Random) -> Asked:
    name, other = rng.sample(_NAMES, 2)
    thing = rng.choice(_THINGS)
    which = rng.randrange(3)
    if which == 0:
        a, b = rng.randint(2, 60), rng.randint(2, 39)
        asked = f"{name} has {a} {thing} and gets {b} more from {other}. How many {thing} does {name} have now?"
        return "word problem", asked, asked, f"{a} + {b}. {add_steps(a, b)}", a + b
    if which == 1:
        a = rng.randint(5, 80)
        b = rng.randint(1, a - 1)
        asked = f"{name} has {a} {thing} and gives {b} of them to {other}. How many {thing} are left?"
        middle = a - b // 10 * 10
        steps = f"{a} - {b // 10 * 10} = {middle}. {middle} - {b % 10} = {a - b}."
        return "word problem", asked, asked, steps, a - b
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    asked = f"{name} has {a} boxes with {b} {thing} in each. How many {thing} are there?"
    return "word problem", asked, asked, f"{a} times {b} is {a * b}.", a * b


_KINDS: tuple[Callable[[random.Random], Asked], ...] = (_sum, _difference, _product, _long_product, _three, _story)
