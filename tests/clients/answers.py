"""Answers as clients put them together, streamed or not, in one comparable form."""

from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

Message = dict[str, Any]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Current weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def user(*content: Any) -> list[Message]:
    """A conversation of one turn: a text, or parts."""
    only_text = len(content) == 1 and isinstance(content[0], str)
    return [{"role": "user", "content": content[0] if only_text else list(content)}]


def image(url: str) -> Message:
    return {"type": "image_url", "image_url": {"url": url}}


def video(url: str) -> Message:
    return {"type": "video_url", "video_url": {"url": url}}


def text(words: str) -> Message:
    return {"type": "text", "text": words}


def ask(client: OpenAI, messages: list[Message], **options: Any) -> ChatCompletion:
    return client.chat.completions.create(**{"model": "default", "messages": messages, "max_tokens": 24, **options})


def listen(client: OpenAI, messages: list[Message], **options: Any) -> list[ChatCompletionChunk]:
    """The chunks of a streamed answer, usage at the end."""
    options = {"stream_options": {"include_usage": True}, **options}
    return list(ask(client, messages, stream=True, **options))


def collected(reply: ChatCompletion) -> dict[str, Any]:
    """Return the content of an answer, without its id and time."""
    return {"usage": reply.usage.model_dump(), "choices": [_choice(choice) for choice in reply.choices]}


def _choice(choice: Any) -> dict[str, Any]:
    message = choice.message
    calls = message.tool_calls or []
    return {
        "reasoning": getattr(message, "reasoning", None) or "",
        "reasoning_content": getattr(message, "reasoning_content", None) or "",
        "content": message.content or "",
        "tool_calls": [(call.type, call.function.name, call.function.arguments) for call in calls],
        "logprobs": [entry.model_dump() for entry in choice.logprobs.content] if choice.logprobs else [],
        "finish_reason": choice.finish_reason,
    }


def assembled(chunks: list[ChatCompletionChunk]) -> dict[str, Any]:
    """The same from chunks; checks on the way what clients rely on in each."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks[:-1]:
        assert len(chunk.choices) == 1, "only the usage chunk, which was asked for, has no choices"
        assert chunk.usage is None
        one = chunk.choices[0]
        if one.index not in choices:
            assert one.delta.role == "assistant"
        texts = {"reasoning": "", "reasoning_content": "", "content": ""}
        choice = choices.setdefault(one.index, {**texts, "tool_calls": {}, "logprobs": [], "finish_reason": None})
        assert choice["finish_reason"] is None, "the finish comes last"
        for name in texts:
            choice[name] += getattr(one.delta, name, None) or ""
        assert len(one.delta.tool_calls or []) <= 1
        for piece in one.delta.tool_calls or []:
            _add_call(choice["tool_calls"], piece)
        choice["logprobs"] += [entry.model_dump() for entry in one.logprobs.content] if one.logprobs else []
        choice["finish_reason"] = one.finish_reason
    assert chunks[-1].choices == []
    for choice in choices.values():
        choice["tool_calls"] = [tuple(call.values()) for _, call in sorted(choice["tool_calls"].items())]
    return {"usage": chunks[-1].usage.model_dump(), "choices": [choice for _, choice in sorted(choices.items())]}


def _add_call(calls: dict[int, dict[str, Any]], piece: Any) -> None:
    """The first piece alone has id, type and name, and no arguments yet."""
    if piece.index in calls:
        assert (piece.id, piece.type, piece.function.name) == (None, None, None)
        calls[piece.index]["arguments"] += piece.function.arguments
    else:
        assert piece.id
        assert piece.function.arguments == ""
        calls[piece.index] = {"type": piece.type, "name": piece.function.name, "arguments": ""}
