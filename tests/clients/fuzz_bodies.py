"""Bodies of chat requests: right, nearly right, and wrong in every way. Each is a function of a seed and a number."""

import json
import random
import string
from collections.abc import Callable
from typing import Any

from answers import TOOLS, image, text, user, video
from system import data_url, encoded, mp4, picture

from services.gateway.request.schemas import ChatRequest
from services.gateway.request.unsupported import NEUTRAL_VALUES

PNG = data_url(encoded(picture(30, 40), "PNG"), "image/png")
MP4 = data_url(mp4(2), "video/mp4")
# Strings that have broken one parser or another.
WORDS = (
    *("", " ", "a", "\0", "\ud800", "\u2028", "é", "\U0001f600", "a" * 300, "[" * 200, "%s{}", "-1", "1e999", "null"),
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "<|IMAGE_PLACEHOLDER|>",
        "<mask:1>",
        "</s>",
        "auto",
        "required",
        "json_object",
    ),
    *("data:image/png;base64,", PNG[:-9], "http://127.0.0.1:1/x", "file:///etc/passwd", "://", "^(a+)+$", "(?<=a)b"),
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    5,
    0.0,
    -0.0,
    0.5,
    5.0,
    1e308,
    -1e308,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**40,
)
SCHEMAS = (
    {},
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]},
    {"enum": []},
    {"$ref": "#"},
    {"type": "string", "pattern": "["},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"anyOf": [{"type": "null"}, {"const": 1}]},
    {"type": "nothing"},
    {"not": {}},
    True,
    False,
)
FIELDS = tuple(sorted({*ChatRequest.__struct_fields__, *NEUTRAL_VALUES}))
KEYS = (
    *FIELDS,
    "type",
    "function",
    "name",
    "parameters",
    "arguments",
    "content",
    "role",
    "url",
    "schema",
    "json_schema",
)


def body_of(seed: int, number: int) -> bytes:
    """Return body `number` of a seed."""
    rng = random.Random(f"{seed} {number}")
    request = _request(rng)
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        _mutate(rng, request)
    if rng.random() < 0.97:
        request["max_completion_tokens"] = rng.choice((1, 2, 3))  # so that what is valid ends soon
    data = json.dumps(request).encode()
    return _damage(rng, data) if rng.random() < 0.1 else data


def _request(rng: random.Random) -> dict[str, Any]:
    """Return a request that is valid but for some fields that may not go together."""
    request: dict[str, Any] = {"model": "demo", "messages": _conversation(rng)}
    request |= {name: make(rng) for name, make in VALID.items() if rng.random() < 0.08}
    return request


def _conversation(rng: random.Random) -> list[Any]:
    messages: list[Any] = [{"role": "system", "content": _word(rng)}] if rng.random() < 0.2 else []
    for _ in range(rng.randrange(3)):
        messages += [*user(_word(rng)), _assistant(rng)]
    media = [image(PNG), image(_word(rng)), video(MP4)] if rng.random() < 0.1 else []
    return messages + (user(*media[: rng.randrange(4)], text(_word(rng))) if media else user(_word(rng) or "x"))


def _assistant(rng: random.Random) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": _word(rng)}}
    said: dict[str, Any] = {"role": "assistant", "content": _word(rng)}
    return said | ({"tool_calls": [call], "reasoning_content": _word(rng)} if rng.random() < 0.3 else {})


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.5 else "".join(rng.choices(string.printable, k=rng.randrange(12)))


def _number(rng: random.Random) -> Any:
    return rng.choice(NUMBERS) if rng.random() < 0.7 else rng.uniform(-3, 3)


def _value(rng: random.Random, depth: int = 0) -> Any:
    """Return JSON of any kind."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 5:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(KEYS): _value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 7:
        return _nested(rng.randrange(100), rng)
    return (None, rng.random() < 0.5, _number(rng), _word(rng), rng.choice(SCHEMAS))[kind]


def _nested(depth: int, rng: random.Random) -> Any:
    inner: Any = _word(rng)
    for _ in range(depth):
        inner = [inner] if rng.random() < 0.5 else {rng.choice(KEYS): inner}
    return inner


VALID: dict[str, Callable[[random.Random], Any]] = {
    "stream": lambda rng: rng.random() < 0.7,
    "stream_options": lambda rng: {"include_usage": True, "continuous_usage_stats": rng.random() < 0.5},
    "n": lambda rng: rng.choice((1, 2)),
    "temperature": lambda rng: rng.choice((0, 0.7, 2)),
    "top_p": lambda rng: rng.random(),
    "top_k": lambda rng: rng.choice((-1, 0, 1, 40)),
    "seed": lambda rng: rng.randrange(100),
    "stop": lambda rng: rng.choice((_word(rng), [_word(rng), "x"])),
    "logprobs": lambda rng: True,
    "top_logprobs": lambda rng: rng.randrange(4),
    "tools": lambda rng: TOOLS,
    "tool_choice": lambda rng: rng.choice(
        ("auto", "none", "required", {"type": "function", "function": {"name": "f"}})
    ),
    "response_format": lambda rng: rng.choice(
        ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "s", "schema": rng.choice(SCHEMAS)}})
    ),
    "structured_outputs": lambda rng: rng.choice(
        ({"choice": ["a", "b"]}, {"regex": _word(rng)}, {"grammar": _word(rng)}, {"json": rng.choice(SCHEMAS)})
    ),
    "guided_json": lambda rng: rng.choice(SCHEMAS),
    "guided_regex": _word,
    "guided_grammar": _word,
    "reasoning_max_tokens": lambda rng: rng.choice((-1, 1, 2)),
    "reasoning_effort": lambda rng: rng.choice(("none", "low", "high")),
    "enable_thinking": lambda rng: rng.random() < 0.5,
    "bad_words": lambda rng: [_word(rng)],
    "logit_bias": lambda rng: {str(rng.randrange(2000)): rng.uniform(-100, 100)},
    "return_token_ids": lambda rng: True,
    "min_tokens": lambda rng: rng.randrange(4),
    "ignore_eos": lambda rng: True,
    "chat_template_kwargs": lambda rng: {rng.choice(("enable_thinking", "options", _word(rng))): _value(rng)},
    "metadata": _value,
}


def _mutate(rng: random.Random, request: dict[str, Any]) -> None:
    """Change, add or remove a value somewhere."""
    if rng.random() < 0.4:
        request[rng.choice(FIELDS)] = _value(rng)
        return
    node: Any = request
    while True:
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not places:
            return
        place = rng.choice(places)
        inner = node[place]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            break
        node = inner
    if rng.random() < 0.2:
        del node[place]
    else:
        node[place] = _value(rng)


def _damage(rng: random.Random, data: bytes) -> bytes:
    """Cut the text, or put bytes into it that may be no JSON and no UTF-8."""
    place = rng.randrange(len(data) + 1)
    odd = rng.choice(
        (b"", b"\xff", b"\xed\xa0\x80", b"\0", b"\\u0000", b"\\ud800", b"NaN", b'"', b"{", b"]" * 9, b"[" * 3000)
    )
    return data[:place] + odd + data[place + rng.choice((0, 0, 1, 4, 10**6)) :]
