"""Translation of a request of the Messages API, field by field, into a chat request."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from services.gateway.dialects.messages.conversation import Conversation, read_conversation
from services.gateway.dialects.messages.schemas import (
    NEUTRAL_VALUES,
    CountRequest,
    JsonSchema,
    MessagesRequest,
    Tool,
    ToolChoice,
)
from services.gateway.request import conversation as chat
from services.gateway.request import schemas
from services.gateway.request.schemas import ChatRequest
from services.gateway.request.statement import Statement
from shared.errors import RequestError, invalid

_CLEARS_THINKING = "clear_thinking_"  # of turns before, which the model's template leaves out by itself
_TOOL = re.compile(r"^(tools\[\d+\])\.function(\.parameters)?")
_NAMES = {"stop": "stop_sequences", "reasoning_effort": "output_config.effort"}


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """Facts of a request that its answer depends on, kept with it."""

    max_tokens: int = 0  # as asked for; the context may leave fewer


def read_kept(kept: bytes) -> Kept:
    """Return what was kept; nothing of a request of another API, whose answer is read here under the same key."""
    try:
        return msgspec.msgpack.decode(kept, type=Kept)
    except msgspec.MsgspecError:
        return Kept()


def translate(body: CountRequest, dialect: str, warnings: tuple[str, ...]) -> Statement:
    """Translate a decoded body, whose fields that are refused are among its attributes.

    Raises:
        RequestError: 400 naming the field: it is not supported, or contradicts another.
    """
    _check_supported(body)
    conversation = read_conversation(body)
    own = body if isinstance(body, MessagesRequest) else None
    request = ChatRequest(
        messages=conversation.messages,
        model=body.model,
        continue_final_message=conversation.continues or None,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ())] or None,
        **_choice(body.tool_choice),
        **_thinking(body),
        **_format(body),
        **({} if own is None else _sampling(own)),
    )
    kept = b"" if own is None else msgspec.msgpack.encode(Kept(own.max_tokens))
    return Statement(request, warnings, dialect, kept, first_usage=True, rename=_Paths(conversation, body).own)


class _Paths(msgspec.Struct, frozen=True):
    """Names of a chat request's fields in the body that it was translated from."""

    conversation: Conversation
    body: CountRequest

    def own(self, path: str) -> str:
        if path == "response_format":
            return "output_format" if self.body.output_format is not None else "output_config.format"
        return self.conversation.path_of(_NAMES.get(path) or _TOOL.sub(_tool_path, path))


def _tool_path(found: re.Match[str]) -> str:
    return f"{found[1]}.input_schema" if found[2] else found[1]


def _check_supported(body: CountRequest) -> None:
    for name, neutral in NEUTRAL_VALUES.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            raise _unsupported(name)
    edits = body.context_management.edits if body.context_management is not None else None
    for i, edit in enumerate(edits or ()):
        if not edit.type.startswith(_CLEARS_THINKING):
            raise _unsupported(f"context_management.edits[{i}]")


def _unsupported(path: str) -> RequestError:
    return invalid(f"`{path}` is not supported by this server.", path, "unsupported_parameter")


def _sampling(body: MessagesRequest) -> Mapping[str, Any]:
    return {
        "stream": body.stream,
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
    }


def _thinking(body: CountRequest) -> Mapping[str, Any]:
    effort = body.output_config.effort if body.output_config is not None else None
    if body.thinking is None:
        return {"reasoning_effort": effort}
    return {
        "reasoning_effort": effort,
        "thinking": schemas.Thinking(body.thinking.type, body.thinking.budget_tokens),
        "include_reasoning": False if body.thinking.display == "omitted" else None,
    }


def _format(body: CountRequest) -> Mapping[str, Any]:
    configured = body.output_config.format if body.output_config is not None else None
    if configured is not None and body.output_format is not None:
        raise invalid("`output_format` is the older name of `output_config.format`: give one.", "output_format")
    asked: JsonSchema | None = configured or body.output_format
    if asked is None:
        return {}
    return {"response_format": schemas.JsonSchemaFormat(schemas.NamedSchema(asked.schema))}


def _choice(choice: ToolChoice | None) -> Mapping[str, Any]:
    if choice is None:
        return {}
    parallel = False if choice.disable_parallel_tool_use else None
    if choice.type != "tool":
        return {"tool_choice": choice.type, "parallel_tool_calls": parallel}
    if choice.name is None:
        raise invalid("`tool_choice.name` must name the tool.", "tool_choice.name")
    return {"tool_choice": {"type": "function", "function": {"name": choice.name}}, "parallel_tool_calls": parallel}


def _tool(tool: Tool, path: str) -> chat.Tool:
    if tool.type not in (None, "custom"):
        text = f"`{path}.type`: this server does not run or know the tool {tool.type!r:.70}; define it by its schema."
        raise invalid(text, f"{path}.type", "unsupported_parameter")
    if tool.input_schema is None:
        raise invalid(f"Missing required field `{path}.input_schema`.", f"{path}.input_schema")
    if tool.defer_loading:
        raise _unsupported(f"{path}.defer_loading")
    if tool.allowed_callers is not None and "direct" not in tool.allowed_callers:
        raise _unsupported(f"{path}.allowed_callers")
    schema = tool.input_schema
    if tool.input_examples:
        schema = {**schema, "examples": tool.input_examples}  # where JSON Schema has them, and the model reads them
    return chat.Tool(chat.Function(tool.name, tool.description, schema, tool.strict))
