"""System prompts that change the language, the form or the name, and questions under them."""

import random
from collections.abc import Callable

import numpy as np

from benchmarks.demo_model import arithmetic, chat, draw, facts, scenes
from benchmarks.demo_model.sample import Message, Part, Sample
from benchmarks.demo_model.text_tasks import LANGUAGES, TRANSLATIONS
from benchmarks.demo_model.tools import NAMES

HELLO = (
    "Bonjour ! Que puis-je faire pour vous ?",
    "Hallo! Was kann ich für Sie tun?",
    "¡Hola! ¿Qué puedo hacer por usted?",
)
RESULT = ("La réponse est {}.", "Die Antwort ist {}.", "La respuesta es {}.")
COLOUR_WORDS = ("red", "green", "blue", "yellow", "black")


def generate(rng: random.Random, size: draw.Size) -> Sample:
    """A question under a system prompt."""
    system, question, reasoning, answer = rng.choice(_KINDS)(rng, size)
    key = f"{system}|{'|'.join(part if isinstance(part, str) else str(np.sum(part)) for part in question)}"
    messages = (Message("system", (system,)), Message("user", question))
    return Sample("instructions", key, messages, answer, reasoning)


Asked = tuple[str, tuple[Part, ...], str, str]  # system prompt, question, reasoning, answer


def _say_in(rng: random.Random, language: str) -> str:
    return rng.choice(("Answer in {}.", "Always answer in {}.", "You speak {} only.", "Reply in {}.")).format(language)


def _language_hello(rng: random.Random, size: draw.Size) -> Asked:
    which = rng.randrange(3)
    asked = rng.choice(chat.TALK["Hello! What can I do for you?"])
    return _say_in(rng, LANGUAGES[which]), (asked,), f"I answer in {LANGUAGES[which]}.", HELLO[which]


def _language_sum(rng: random.Random, size: draw.Size) -> Asked:
    which, a, b = rng.randrange(3), rng.randint(0, 99), rng.randint(0, 99)
    reasoning = f"I answer in {LANGUAGES[which]}. {arithmetic.add_steps(a, b)}"
    return _say_in(rng, LANGUAGES[which]), (f"What is {a} + {b}?",), reasoning, RESULT[which].format(a + b)


def _language_word(rng: random.Random, size: draw.Size) -> Asked:
    which, word = rng.randrange(3), rng.choice(sorted(TRANSLATIONS))
    language = LANGUAGES[which]
    system = f"Translate what the user says into {language}."
    return system, (word,), f"I know the {language} word for {word}.", TRANSLATIONS[word][which]


def _language_colour(rng: random.Random, size: draw.Size) -> Asked:
    which, colour, kind = rng.randrange(3), rng.choice(COLOUR_WORDS), rng.choice(draw.SHAPES)
    thing = scenes.Thing(colour, kind, rng.randrange(3), rng.randrange(3))
    picture = scenes.paint(rng, size, (thing,))
    reasoning = f"I see {scenes.a(thing.name)} {thing.place}. I answer in {LANGUAGES[which]}."
    return _say_in(rng, LANGUAGES[which]), (picture, "Which colour is it?"), reasoning, TRANSLATIONS[colour][which]


def _only_number(rng: random.Random, size: draw.Size) -> Asked:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    system = rng.choice(
        ("Answer with the number only.", "Give only the result.", "Reply with a number and nothing else.")
    )
    return system, (f"What is {a} + {b}?",), f"Only the number. {arithmetic.add_steps(a, b)}", str(a + b)


def _capitals(rng: random.Random, size: draw.Size) -> Asked:
    system = rng.choice(("Write in capital letters.", "Answer in upper case.", "Use capital letters only."))
    asked, reasoning, answer = _plain(rng)
    return system, (asked,), f"In capital letters. {reasoning}", answer.upper()


def _ending(rng: random.Random, size: draw.Size) -> Asked:
    word = rng.choice(("Over.", "Done.", "Cheers!", "Ahoy!", "The end.", "Good luck!"))
    asked, reasoning, answer = _plain(rng)
    return f'End every answer with "{word}"', (asked,), f'I end with "{word}" {reasoning}', f"{answer} {word}"


def _name(rng: random.Random, size: draw.Size) -> Asked:
    name = rng.choice(NAMES)
    asked = rng.choice(("What is your name?", "Who are you?", "What are you called?"))
    return f"Your name is {name}.", (asked,), "The system prompt gives me a name.", f"My name is {name}."


def _plain(rng: random.Random) -> tuple[str, str, str]:
    if rng.random() < 0.5:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        return f"What is {a} + {b}?", arithmetic.add_steps(a, b), f"The answer is {a + b}."
    sample = facts.generate(rng)
    (asked,) = sample.messages[0].parts
    assert isinstance(asked, str)
    return asked, sample.reasoning, sample.answer


_KINDS: tuple[Callable[[random.Random, draw.Size], Asked], ...] = (
    _language_hello,
    _language_sum,
    _language_word,
    _language_colour,
    _only_number,
    _capitals,
    _ending,
    _name,
)
