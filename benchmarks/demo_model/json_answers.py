"""Answers in JSON: facts of a sentence under given keys, by a list of keys or by a schema."""

import json
import random
from collections.abc import Callable
from typing import Any

from benchmarks.demo_model.sample import Sample, user
from benchmarks.demo_model.tools import CITIES, DAYS, NAMES, NOUNS

Record = tuple[str, dict[str, Any]]  # the text, what it says


def generate(rng: random.Random) -> Sample:
    """A sentence to put into JSON."""
    text, record = rng.choice(_RECORDS)(rng)
    if len(record) > 2 and rng.random() < 0.4:
        dropped = rng.choice(sorted(record))
        record = {key: value for key, value in record.items() if key != dropped}
    keys = list(record)
    rng.shuffle(keys)
    record = {key: record[key] for key in keys}
    answer = json.dumps(record, ensure_ascii=False)
    if rng.random() < 0.4:
        schema = {
            "type": "object",
            "properties": {key: _schema(value) for key, value in record.items()},
            "required": keys,
        }
        asked = f"Answer with JSON that follows this schema: {json.dumps(schema)}\n{text}"
    else:
        listed = ", ".join(f'"{key}"' for key in keys)
        form = rng.choice(
            ("Write as JSON with the keys {}: {}", "{1} Give me JSON with the keys {0}.", "Extract {} as JSON. {}")
        )
        asked = form.format(listed, text)
    reasoning = "The values are: " + "; ".join(f"{key}: {json.dumps(value)}" for key, value in record.items()) + "."
    return Sample("json", text, user(asked), answer, reasoning)


def _schema(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer"}
    if isinstance(value, list):
        return {"type": "array", "items": {"type": "string"}}
    return {"type": "string"}


def _person(rng: random.Random) -> Record:
    name, age, city = rng.choice(NAMES), rng.randint(5, 95), rng.choice(CITIES)
    text = rng.choice(
        (
            f"{name} is {age} years old and lives in {city}.",
            f"{name}, {age}, is from {city}.",
            f"In {city} lives {name}, who is {age}.",
        )
    )
    return text, {"name": name, "age": age, "city": city}


def _order(rng: random.Random) -> Record:
    name, count, item = rng.choice(NAMES), rng.randint(1, 50), rng.choice(NOUNS)
    paid = rng.random() < 0.5
    state = "has paid" if paid else "has not paid yet"
    return f"{name} ordered {count} of the item {item} and {state}.", {
        "customer": name,
        "quantity": count,
        "item": item,
        "paid": paid,
    }


def _meeting(rng: random.Random) -> Record:
    day, hour = rng.choice(DAYS), f"{rng.randint(7, 19):02}:{rng.choice((0, 15, 30, 45)):02}"
    people = rng.sample(NAMES, rng.randint(1, 3))
    text = f"We meet on {day} at {hour} with {', '.join(people)}."
    return text, {"day": day, "time": hour, "people": people}


def _product(rng: random.Random) -> Record:
    item, price, stock = rng.choice(NOUNS), rng.randint(1, 999), rng.random() < 0.5
    there = "is in stock" if stock else "is sold out"
    return f"The {item} costs {price} euros and {there}.", {"product": item, "price": price, "in_stock": stock}


_RECORDS: tuple[Callable[[random.Random], Record], ...] = (_person, _order, _meeting, _product)
