"""A pool of requests for clients whose answers are functions of the request alone, greedy or with a seed."""

import copy
import random
from dataclasses import dataclass
from typing import Any

from system import data_url, encoded, picture

KINDS = (
    "text",
    "seeded",
    "long",
    "penalised",
    "logprobs",
    "choices",
    "thinking",
    "stop",
    "image",
    "link",
    "tools",
    "guided",
    "forced",
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": {"type": "object"}},
}
ENDLESS = {
    "type": "object",
    "properties": {
        "a": {"type": "array", "minItems": 1000, "items": {"enum": ["mill", {"race": [1, 22, None]}]}},
    },
    "required": ["a"],
}
WORDS = (
    "the",
    "mill",
    "race",
    "runs",
    "under",
    "an",
    "old",
    "stone",
    "bridge",
    "where",
    "water",
    "turns",
    "a",
    "wheel",
)
PICTURES = [(84, 56), (56, 84), (112, 84)]


@dataclass(frozen=True)
class Ask:
    """One request of the pool, without what a client adds (how it is sent, under which key)."""

    number: int
    kind: str
    body: dict[str, Any]

    def reworded(self, times: int) -> "Ask":
        """The same in other words: with some more at the end."""
        more, body = " again" * times, copy.deepcopy(self.body)
        (message,) = body["messages"]
        if isinstance(message["content"], str):
            message["content"] += more
        else:
            message["content"][-1]["text"] += more
        return Ask(self.number, self.kind, body)


def pool(size: int, tool_call_id: int, files: str) -> list[Ask]:
    """`size` requests of all kinds in turn; the same every time. `files`: where `files_to_serve` are served."""
    return [_ask(number, KINDS[number % len(KINDS)], tool_call_id, files) for number in range(size)]


def files_to_serve() -> dict[str, tuple[str, bytes]]:
    """Return the files that requests of kind "link" link to."""
    return {f"/{n}.png": ("image/png", _png(n)) for n in range(len(PICTURES))}


def _ask(number: int, kind: str, tool_call_id: int, files: str) -> Ask:
    rng = random.Random(number)
    text = " ".join(rng.choices(WORDS, k=rng.randint(3, 40)))
    seeded = {"temperature": 1.0, "top_p": 0.9, "seed": number}
    # In all: long enough that most faults find most requests in the middle.
    body = {
        "model": "chaos",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": rng.randint(30, 90),
        "ignore_eos": True,
        "return_token_ids": True,
    }
    match kind:
        case "seeded":
            body |= seeded
        case "long":
            body |= {**seeded, "max_tokens": 220}
        case "penalised":
            body |= {**seeded, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}
        case "logprobs":
            body |= {"logprobs": True, "top_logprobs": 3, "return_token_ids": False}
        case "choices":
            body |= {**seeded, "n": 2}
        case "thinking":
            body |= {**seeded, "reasoning_max_tokens": 20}
        case "stop":
            # Ends somewhere in the text, by a string that no token is.
            body |= {**seeded, "stop": ["th", "e w"], "chat_template_kwargs": {"enable_thinking": False}}
        case "guided":
            # Its JSON goes on for as long as the tokens do; the thinking before it is closed by its budget.
            schema = {"name": "mill", "schema": ENDLESS}
            body |= {
                **seeded,
                "response_format": {"type": "json_schema", "json_schema": schema},
                "reasoning_max_tokens": 5,
            }
        case "forced":
            # A call that must come, by a structural tag; its arguments end as seldom.
            function = {**TOOL["function"], "parameters": ENDLESS}
            body |= {
                **seeded,
                "tools": [{"type": "function", "function": function}],
                "tool_choice": "required",
                "reasoning_max_tokens": 5,
            }
        case "image":
            pictures = [number % len(PICTURES)] if number % 2 else [number % len(PICTURES), 0]
            body |= seeded | {"messages": [_with_pictures(text, [data_url(_png(n), "image/png") for n in pictures])]}
        case "link":
            body |= {"messages": [_with_pictures(text, [f"{files}/{number % len(PICTURES)}.png"])]}
        case "tools":
            body |= {
                **seeded,
                "tools": [TOOL],
                "chat_template_kwargs": {"enable_thinking": False},
                "logit_bias": {str(tool_call_id): 9},
                "ignore_eos": False,
                "max_tokens": 120,
            }
    return Ask(number, kind, body)


def _with_pictures(text: str, urls: list[str]) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _png(n: int) -> bytes:
    return encoded(picture(*PICTURES[n], seed=n), "PNG")
