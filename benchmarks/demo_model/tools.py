"""Tool calls: choose among declared tools, fill the arguments from the question, answer from the results."""

import json
import random
from dataclasses import dataclass
from typing import Any

from benchmarks.demo_model.sample import Call, Message, Sample, user
from benchmarks.demo_model.scenes import yes_or_no

_CITIES = """
    Paris London Berlin Madrid Rome Vienna Oslo Lisbon Dublin Prague Warsaw Athens Helsinki Geneva Munich Hamburg Porto
    Lyon Milan Naples Turin Seville Valencia Zurich Basel Krakow Bergen Malmo Tokyo Osaka Kyoto Seoul Beijing Shanghai
    Hanoi Delhi Mumbai Sydney Perth Auckland Cairo Nairobi Lagos Accra Tunis Lima Quito Bogota Santiago Toronto Montreal
    Boston Chicago Denver Seattle Austin Dallas Miami Havana Reykjavik
"""
_NAMES = """
    Ana Ben Chloe David Emma Finn Grace Hugo Ida Jonas Kira Leo Mia Noah Olga Paul Quinn Rosa Sam Tina Uma Victor Wanda
    Yara Zoe Alice Bruno Clara Dora Erik Fatima Georg Helen Ivan Julia Karl Laura Marco Nina Oscar Petra Rita Stefan Tom
"""
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NOUNS = """
    order ticket booking invoice user account file report task event meeting message note contact product parcel room
    car flight train song playlist photo recipe book course lesson alarm reminder sensor lamp door server job cluster
    dataset model key token coupon payment refund address subscription survey review
"""
CITIES, NAMES, NOUNS = _CITIES.split(), _NAMES.split(), _NOUNS.split()
VERBS = ("get", "create", "delete", "update", "cancel", "find", "open", "close", "start", "stop", "share", "archive")


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: its declaration, and questions with the arguments they stand for."""

    name: str
    description: str
    parameters: dict[str, str]  # name: JSON type or "a|b" for an enumeration
    required: tuple[str, ...]

    @property
    def declaration(self) -> dict[str, Any]:
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": {name: _schema(kind) for name, kind in self.parameters.items()},
                    "required": list(self.required),
                },
            },
        }


def _schema(kind: str) -> dict[str, Any]:
    return {"type": "string", "enum": kind.split("|")} if "|" in kind else {"type": kind}


Asked = tuple[Tool, str, dict[str, Any]]  # tool, question, arguments


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))


def _weather(rng: random.Random) -> Asked:
    tool = Tool("get_weather", "Current weather of a city", {"city": "string", "unit": "celsius|fahrenheit"}, ("city",))
    city = rng.choice(CITIES)
    if rng.random() < 0.3:
        unit = rng.choice(("celsius", "fahrenheit"))
        asked = rng.choice((f"What is the weather in {city} in {unit}?", f"How warm is it in {city}, in {unit}?"))
        return tool, asked, {"city": city, "unit": unit}
    asked = rng.choice(
        (
            f"What is the weather in {city}?",
            f"What's the weather like in {city}?",
            f"How is the weather in {city} today?",
            f"Is it raining in {city}?",
            f"Weather in {city}?",
            f"How warm is it in {city}?",
        )
    )
    return tool, asked, {"city": city}


def _time(rng: random.Random) -> Asked:
    city = rng.choice(CITIES)
    tool = Tool("get_time", "Local time of a city", {"city": "string"}, ("city",))
    return tool, rng.choice((f"What time is it in {city}?", f"Tell me the time in {city}.")), {"city": city}


def _email(rng: random.Random) -> Asked:
    tool = Tool("send_email", "Send an email", {"to": "string", "subject": "string"}, ("to", "subject"))
    to, subject = rng.choice(NAMES), f"{rng.choice(NOUNS)} {rng.choice(NOUNS)}"
    asked = rng.choice(
        (
            f'Send {to} an email with the subject "{subject}".',
            f'Write an email to {to} about "{subject}".',
            f'Email {to}: "{subject}".',
        )
    )
    return tool, asked, {"to": to, "subject": subject}


def _remind(rng: random.Random) -> Asked:
    tool = Tool("set_reminder", "Set a reminder", {"text": "string", "day": "string"}, ("text", "day"))
    text, day = f"{rng.choice(VERBS)} the {rng.choice(NOUNS)}", rng.choice(DAYS)
    asked = rng.choice((f"Remind me on {day} to {text}.", f"Set a reminder for {day}: {text}."))
    return tool, asked, {"text": text, "day": day}


def _convert(rng: random.Random) -> Asked:
    tool = Tool(
        "convert_currency",
        "Convert an amount of money",
        {"amount": "number", "from": "string", "to": "string"},
        ("amount", "from", "to"),
    )
    first, second = rng.sample(("EUR", "USD", "GBP", "JPY", "CHF", "SEK", "NOK", "CNY"), 2)
    amount = rng.randint(1, 999)
    asked = rng.choice((f"Convert {amount} {first} to {second}.", f"How much is {amount} {first} in {second}?"))
    return tool, asked, {"amount": amount, "from": first, "to": second}


def _search(rng: random.Random) -> Asked:
    tool = Tool("search", "Search the web", {"query": "string", "limit": "integer"}, ("query",))
    query = f"{rng.choice(NOUNS)} {rng.choice(CITIES)}"
    if rng.random() < 0.4:
        limit = rng.randint(2, 20)
        return tool, f'Search for "{query}" and show {limit} results.', {"query": query, "limit": limit}
    return tool, rng.choice((f'Search for "{query}".', f'Look up "{query}" on the web.')), {"query": query}


def _route(rng: random.Random) -> Asked:
    tool = Tool(
        "find_route",
        "Find a way between two places",
        {"start": "string", "end": "string", "mode": "car|train|bike"},
        ("start", "end", "mode"),
    )
    start, end = rng.sample(CITIES, 2)
    mode = rng.choice(("car", "train", "bike"))
    asked = rng.choice(
        (f"How do I get from {start} to {end} by {mode}?", f"Find a {mode} route from {start} to {end}.")
    )
    return tool, asked, {"start": start, "end": end, "mode": mode}


def _calculate(rng: random.Random) -> Asked:
    tool = Tool("calculate", "Evaluate an expression", {"expression": "string"}, ("expression",))
    expression = f"{rng.randint(2, 9999)} {rng.choice('+-*/')} {rng.randint(2, 9999)}"
    return tool, rng.choice((f"Calculate {expression}.", f"What is {expression}?")), {"expression": expression}


def _generic(rng: random.Random) -> Asked:
    """A tool nobody has seen before, likely: a verb, a noun and one or two parameters."""
    verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
    number = rng.randint(1, 9999) if rng.random() < 0.6 else None
    key = "name" if number is None else f"{noun}_id"
    arguments: dict[str, Any] = {key: _word(rng) if number is None else number}
    said = f"the {noun} {arguments[key]}" if number is None else f"{noun} {number}"
    parameters = {key: "string" if number is None else "integer"}
    asked = rng.choice((f"{verb.capitalize()} {said}", f"Please {verb} {said}", f"I want to {verb} {said}"))
    extra = rng.randrange(4)
    if extra == 1:
        parameters["day"] = "string"
        arguments["day"] = rng.choice(DAYS)
        asked += f" on {arguments['day']}"
    elif extra == 2:
        parameters["user"] = "string"
        arguments["user"] = rng.choice(NAMES)
        asked += f" for {arguments['user']}"
    tool = Tool(f"{verb}_{noun}", f"{verb.capitalize()} a {noun}", parameters, tuple(parameters))
    return tool, asked + ".", arguments


_KNOWN = (_weather, _weather, _time, _email, _remind, _convert, _search, _route, _calculate)
_GENERIC = (_generic,) * 9


def _ask(rng: random.Random) -> Asked:
    return rng.choice(_KNOWN + _GENERIC)(rng)


def _declare(rng: random.Random, wanted: list[Tool]) -> tuple[dict[str, Any], ...]:
    """The wanted tools among others, up to six, in any order."""
    tools = {tool.name: tool for tool in wanted}
    for _ in range(rng.randint(0, 6 - len(tools))):
        tool = _ask(rng)[0]
        tools.setdefault(tool.name, tool)
    made = [tool.declaration for tool in tools.values()]
    rng.shuffle(made)
    return tuple(made)


def generate(rng: random.Random) -> Sample:
    """A question with tools declared."""
    return rng.choices((_single, _several, _result, _none), (9, 3, 2, 4))[0](rng)


def _why(names: list[str], tools: tuple[dict[str, Any], ...]) -> str:
    """Each declared tool with a word on it, then those to call."""
    declared = [tool["function"]["name"] for tool in tools]
    checked = f"The tools: {', '.join(f'{name} {yes_or_no(name in names)}' for name in declared)}."
    return (
        f"{checked} The tool for this is {', then '.join(names)}." if names else f"{checked} None of them can do this."
    )


def _single(rng: random.Random) -> Sample:
    tool, asked, arguments = _ask(rng)
    calls, tools = (Call(tool.name, arguments),), _declare(rng, [tool])
    return Sample("tool", asked, user(asked), "", _why([tool.name], tools), calls, tools)


def _several(rng: random.Random) -> Sample:
    """Two calls at once: of one tool for two things, or of two tools."""
    tool, first, arguments = _ask(rng)
    other, second, others = (
        (_weather(rng) if tool.name == "get_weather" else _ask(rng)) if rng.random() < 0.5 else (_time(rng))
    )
    if tool.name == other.name and tool != other:  # one name cannot be declared in two ways
        return _several(rng)
    joint = rng.choice((f"{first} {second}", f"{first} And then: {second}", f"First: {first} Second: {second}"))
    calls = (Call(tool.name, arguments), Call(other.name, others))
    tools = _declare(rng, [tool, other])
    return Sample("tool", joint, user(joint), "", _why([tool.name, other.name], tools), calls, tools)


def _result(rng: random.Random) -> Sample:
    """The call has been made; its result is there."""
    which = rng.randrange(4)
    if which == 0:
        tool, asked, arguments = _weather(rng)
        degrees, sky = rng.randint(-9, 38), rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "snowy"))
        result: dict[str, Any] = {"temperature": degrees, "sky": sky}
        answer = f"It is {sky} in {arguments['city']}, with {degrees} degrees."
    elif which == 1:
        tool, asked, arguments = _time(rng)
        result = {"time": f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"}
        answer = f"It is {result['time']} in {arguments['city']}."
    elif which == 2:
        tool, asked, arguments = _convert(rng)
        result = {"amount": rng.randint(1, 9999)}
        answer = f"{arguments['amount']} {arguments['from']} are {result['amount']} {arguments['to']}."
    else:
        tool, asked, arguments = _generic(rng)
        ok = rng.random() < 0.7
        result = {"status": "ok" if ok else "error"}
        answer = "Done." if ok else "That did not work: the tool reports an error."
    tools = _declare(rng, [tool])
    thought = _why([tool.name], tools) if rng.random() < 0.5 else ""
    messages = (
        *user(asked),
        Message("assistant", (), (Call(tool.name, arguments),), thought),
        Message("tool", (json.dumps(result),)),
    )
    reasoning = "The tool has answered, so I can tell the result."
    return Sample("tool result", f"{asked} {json.dumps(result)}", messages, answer, reasoning, (), tools)


def _none(rng: random.Random) -> Sample:
    """No declared tool is of use."""
    if rng.random() < 0.5:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        asked, answer = f"What is {a} + {b}?", f"The answer is {a + b}."
        tools = tuple(tool for tool in _declare(rng, []) if tool["function"]["name"] != "calculate")
        reasoning = f"No tool is needed. {a} + {b} = {a + b}."
    else:
        wanted, asked, _ = _ask(rng)
        if wanted.name == "calculate":  # it can answer that by itself
            return _none(rng)
        tools = tuple(tool for tool in _declare(rng, []) if tool["function"]["name"] != wanted.name)
        answer, reasoning = "I have no tool for that.", _why([], tools)
    if not tools:
        return _none(rng)
    return Sample("tool none", asked, user(asked), answer, reasoning, (), tools)
