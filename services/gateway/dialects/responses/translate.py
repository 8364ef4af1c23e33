"""A body of this API as a chat request, and what its answer repeats of it."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from services.gateway.dialects.responses.body import (
    INCLUDES,
    LOGPROBS,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponsesRequest,
    extensions,
)
from services.gateway.dialects.responses.conversation import Conversation
from services.gateway.dialects.responses.tools import chosen_tool, declared_tools, shown_tool
from services.gateway.request import schemas
from services.gateway.request.schemas import ChatRequest
from shared.errors import invalid
from shared.model.generation import GenerationDefaults

HISTORY = "previous_response_id"

_STEP = re.compile(r"[.\[]")

# Fields of the chat request, and how this API calls them.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
    "tool_choice.allowed_tools": "tool_choice",
}


class Translation(msgspec.Struct, frozen=True):
    """A request in both words."""

    chat: ChatRequest
    names: dict[str, str]  # path in the chat request -> path in the body

    def rename(self, path: str) -> str:
        """Return the path in the body of a path in the chat request."""
        for end in sorted({len(path), *(found.start() for found in _STEP.finditer(path))}, reverse=True):
            if (own := self.names.get(path[:end])) is not None:
                return own if own == HISTORY else own + path[end:]
        return path


def translate(request: ResponsesRequest, history: Sequence[dict[str, Any]]) -> Translation:
    """Return the chat request; `history` are the items of earlier turns.

    Raises:
        RequestError: 400 naming the field of this API.
    """
    logprobs = _reads_logprobs(request)
    conversation = _conversation(request, history)
    tools = declared_tools(request.tools or ())
    chat = ChatRequest(
        messages=conversation.messages,
        model=request.model,
        stream=request.stream,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        tools=[tool for tool, _ in tools] or None,
        tool_choice=chosen_tool(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(request),
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        logprobs=logprobs or None,
        top_logprobs=request.top_logprobs if logprobs else None,
        **extensions(request),
    )
    names = {f"tools[{index}].function": path for index, (_, path) in enumerate(tools)}
    return Translation(chat, {**_NAMES, **names, **conversation.names})


def echo(request: ResponsesRequest, defaults: GenerationDefaults) -> dict[str, Any]:
    """Return the fields of an answer that repeat its request, defaults filled in."""
    reasoning = request.reasoning
    text = request.text
    return {
        "instructions": request.instructions,
        "previous_response_id": request.previous_response_id,
        "tools": [shown_tool(tool) for tool in request.tools or ()],
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": reasoning and reasoning.asked_summary,
        },
        "text": {"format": _shown_format(text.format if text else None), "verbosity": "medium"},
        "temperature": defaults.temperature if request.temperature is None else request.temperature,
        "top_p": defaults.top_p if request.top_p is None else request.top_p,
        "presence_penalty": _number(request, "presence_penalty", defaults.presence_penalty),
        "frequency_penalty": _number(request, "frequency_penalty", defaults.frequency_penalty),
        "top_logprobs": request.top_logprobs or 0,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "truncation": "disabled",
        "store": request.store is not False,
        "background": bool(request.background),
        "service_tier": "default",
        "metadata": request.metadata or {},
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }


def input_items(request: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the input as items."""
    if isinstance(request.input, str):
        return [{"type": "message", "role": "user", "content": request.input}]
    return request.input


def _number(request: ResponsesRequest, field: str, default: float) -> float:
    given: float | None = getattr(request, field)
    return default if given is None else given


def _reads_logprobs(request: ResponsesRequest) -> bool:
    for index, name in enumerate(request.include or ()):
        if name not in INCLUDES:
            field = f"include[{index}]"
            text = f"`{field}`: {name!r:.70} is not supported by this server; there is {', '.join(INCLUDES)}."
            raise invalid(text, field, "unsupported_parameter")
    included = LOGPROBS in (request.include or ())
    if request.top_logprobs and not included:
        raise invalid(f"`top_logprobs` needs `include` to have {LOGPROBS}.", "top_logprobs")
    return included


def _conversation(request: ResponsesRequest, history: Sequence[dict[str, Any]]) -> Conversation:
    conversation = Conversation()
    if request.instructions is not None:
        conversation.add_text("system", request.instructions, "instructions")
    conversation.add_items(history, HISTORY, indexed=False)
    if isinstance(request.input, str):
        conversation.add_text("user", request.input, "input")
    else:
        conversation.add_items(request.input, "input")
    conversation.finish()
    if len(conversation.messages) == (request.instructions is not None) or not request.input:
        raise invalid("`input` must be a text or have items.", "input", "missing_required_parameter")
    return conversation


def _response_format(request: ResponsesRequest) -> schemas.ResponseFormat | None:
    form = request.text.format if request.text else None
    match form:
        case JsonObjectFormat():
            return schemas.JsonObjectFormat()
        case JsonSchemaFormat(schema, name, description, strict):
            return schemas.JsonSchemaFormat(schemas.NamedSchema(schema, name, description, strict))
    return None


def _shown_format(form: Any) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": "text"} if form is None else msgspec.to_builtins(form)
    if isinstance(form, JsonSchemaFormat):
        shown["strict"] = True
    return shown
