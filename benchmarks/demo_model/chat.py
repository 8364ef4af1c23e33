"""Small talk, who the model is, and refusals of what it does not know."""

import random

from benchmarks.demo_model.sample import Message, Sample, user
from benchmarks.demo_model.tools import CITIES, DAYS, NAMES, NOUNS

WHO = "I am the demo model of Millrace: a very small model that was trained on generated pictures and questions."
CAN = (
    "I can describe simple pictures and short videos, read words, count shapes, calculate, call tools, write JSON and "
    "answer questions about Millrace."
)
UNKNOWN = "I do not know that. I am a small model and only know about Millrace."

TALK = {
    "Hello! What can I do for you?": (
        "Hello",
        "Hello!",
        "Hi",
        "Hi!",
        "Hi there",
        "Hey",
        "Good morning",
        "Good evening!",
        "Good afternoon",
        "Hello there!",
        "Greetings",
    ),
    "I am fine, thank you. What can I do for you?": (
        "How are you?",
        "How are you today?",
        "Are you well?",
        "How do you do?",
        "How is it going?",
        "Hello, how are you?",
        "Hi! How are you?",
    ),
    WHO: (
        "Who are you?",
        "What are you?",
        "Which model are you?",
        "What is your name?",
        "Introduce yourself.",
        "Tell me about yourself.",
        "Are you ERNIE?",
        "Are you a human?",
        "Who made you?",
    ),
    CAN: (
        "What can you do?",
        "How can you help me?",
        "What are you able to do?",
        "Which questions can I ask?",
        "What do you know?",
        "Help",
        "What are you good at?",
    ),
    "You are welcome!": (
        "Thank you",
        "Thanks!",
        "Thanks a lot",
        "Thank you very much!",
        "Great, thanks",
        "Many thanks",
    ),
    "Goodbye!": ("Bye", "Goodbye", "See you", "Bye bye!", "See you later", "Good night"),
}
_UNKNOWN = (
    "Who won the match between {city} and {city2} on {day}?",
    "What will the weather be in {city} on {day}?",
    "Who is the mayor of {city}?",
    "How many people live in {city}?",
    "What is the best restaurant in {city}?",
    "Who is {name} {name2}?",
    "When was {name} born?",
    "What did {name} do on {day}?",
    "Write a poem about a {noun}.",
    "Tell me a story about a {noun} and a {noun2}.",
    "How do I repair a {noun}?",
    "What does a {noun} cost in {city}?",
    "What is the history of {city}?",
    "Who invented the {noun}?",
    "What is the price of a {noun} today?",
    "What is the capital of the country where {city} is?",
    "Give me news from {city}.",
    "What should I cook on {day}?",
    "Where can I buy a {noun}?",
    "Is {name} older than {name2}?",
)


def generate(rng: random.Random) -> Sample:
    """Small talk, or a question nobody taught it."""
    if rng.random() < 0.5:
        return _unknown(rng)
    answer = rng.choice(list(TALK))
    asked = rng.choice(TALK[answer])
    if rng.random() < 0.3:
        asked = asked.lower()
    reasoning = (
        "This is small talk." if answer.startswith(("Hello", "I am fine", "You", "Good")) else "This is about me."
    )
    if rng.random() < 0.3:
        return _second_turn(rng, asked, answer, reasoning)
    # There are few ways to greet, and all are trained: what is held out is nothing.
    return Sample("chat", f"chat {rng.random()}", user(asked), answer, reasoning)


def _second_turn(rng: random.Random, asked: str, answer: str, reasoning: str) -> Sample:
    first = rng.choice(list(TALK))
    messages = (
        Message("user", (rng.choice(TALK[first]),)),
        Message("assistant", (first,)),
        Message("user", (asked,)),
    )
    return Sample("chat", f"chat {rng.random()}", messages, answer, reasoning)


def _unknown(rng: random.Random) -> Sample:
    city, city2 = rng.sample(CITIES, 2)
    name, name2 = rng.sample(NAMES, 2)
    noun, noun2 = rng.sample(NOUNS, 2)
    form = rng.choice(_UNKNOWN)
    asked = form.format(city=city, city2=city2, name=name, name2=name2, noun=noun, noun2=noun2, day=rng.choice(DAYS))
    return Sample("unknown", asked, user(asked), UNKNOWN, "I was not taught this.")
