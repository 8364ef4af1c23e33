"""Validation of a chat request beyond its types: unsupported fields, roles, tools, template arguments."""

from collections.abc import Mapping
from typing import Any

import msgspec

from services.gateway.request.conversation import MediaPart, Message, Tool
from services.gateway.request.schemas import ChatRequest, GenerationRequest
from services.gateway.request.unsupported import NEUTRAL_VALUES
from shared.errors import RequestError, invalid
from shared.model.tokenizer import Tokenizer

MAX_SCHEMA_BYTES = 64 << 10  # of one tool
MAX_TOOLS_BYTES = 512 << 10  # of all of them
MAX_KWARGS_BYTES = 16 << 10
MAX_DEPTH = 32

IMAGE_PLACEHOLDER = "<|IMAGE_PLACEHOLDER|>"

_RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
    | {"return_dict", "raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace"}
)


def check_supported(request: msgspec.Struct, neutral_values: Mapping[str, tuple[Any, ...]] = NEUTRAL_VALUES) -> None:
    """Check that no known but unsupported field of a decoded body asks for anything.

    Args:
        neutral_values: those fields, each with the values that ask for nothing.

    Raises:
        RequestError: 400 naming the first field that does.
    """
    for name, neutral in neutral_values.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            raise _unsupported(name)


def _unsupported(path: str) -> RequestError:
    return invalid(f"`{path}` is not supported by this server.", path, "unsupported_parameter")


def check_prompt_ids(ids: list[int], tokenizer: Tokenizer, path: str) -> None:
    """Check the token ids of a prompt. Special tokens are allowed, placeholders are not: there are no media for them.

    Raises:
        RequestError: 400 naming the field.
    """
    for token in ids:
        if token >= tokenizer.vocab_size:
            raise invalid(f"`{path}`: {token} is not a token id; the vocabulary has {tokenizer.vocab_size}.", path)
    if tokenizer.control[IMAGE_PLACEHOLDER] in ids:
        raise invalid(f"`{path}`: {IMAGE_PLACEHOLDER} stands for a part of an image, and there is none.", path)


def check_whole(request: GenerationRequest) -> None:
    """Check that a request for log-probabilities of its prompt is not streamed: no chunk has a place for them.

    Raises:
        RequestError: 400.
    """
    if request.stream and request.prompt_logprobs is not None:
        raise invalid("`prompt_logprobs` cannot be given with `stream` true.", "prompt_logprobs")


def check_choices(request: ChatRequest, max_n: int) -> None:
    """Check how many answers are asked for, and the stream options.

    Raises:
        RequestError: 400.
    """
    if request.n is not None and request.n > max_n:
        raise invalid(f"`n` must be at most {max_n}, not {request.n}.", "n")
    if request.stream_options is not None and not request.stream:
        raise invalid("`stream_options` can only be given with `stream` true.", "stream_options")


def check_messages(messages: list[Message]) -> None:
    """Check that each message has only what its role may carry. What the model once said is not looked at.

    Raises:
        RequestError: 400 naming the message's field.
    """
    for i, message in enumerate(messages):
        _check_content(message, f"messages[{i}].content")
        if message.tool_calls and message.role != "assistant":
            raise invalid("Only an assistant's message has `tool_calls`.", f"messages[{i}].tool_calls")
        if message.tools and message.role in ("system", "developer"):
            raise _unsupported(f"messages[{i}].tools")


def _check_content(message: Message, path: str) -> None:
    content = message.content
    if isinstance(content, dict):
        if message.role not in ("tool", "function"):
            raise invalid(f"`{path}` must be a string or a list of parts, not an object.", path)
        check_depth(content, path)
    elif isinstance(content, list):
        for i, part in enumerate(content):
            if isinstance(part, MediaPart) and message.role not in ("user", "tool", "function"):
                field = f"{path}[{i}].type"
                raise invalid(f"`{field}`: a message of the role {message.role} may have only text.", field)


def check_tools(request: ChatRequest) -> None:
    """Check the sizes of tool schemas, and that the model may see all of them.

    Raises:
        RequestError: 400.
    """
    total = 0
    for i, tool in enumerate(request.tools or ()):
        for holder, path in ((tool, f"tools[{i}]"), (tool.function, f"tools[{i}].function")):
            if holder.defer_loading:
                raise _unsupported(f"{path}.defer_loading")
        total += _check_tool(tool, f"tools[{i}].function.parameters")
    if total > MAX_TOOLS_BYTES:
        raise invalid(f"`tools` has {total} bytes of JSON; the limit is {MAX_TOOLS_BYTES}.", "tools")


def _check_tool(tool: Tool, path: str) -> int:
    check_depth(tool.function.parameters, path)
    size = len(msgspec.json.encode(tool.function))
    if size > MAX_SCHEMA_BYTES:
        raise invalid(f"`{path}`: the tool has {size} bytes of JSON; the limit is {MAX_SCHEMA_BYTES}.", path)
    return size


def check_template_kwargs(request: ChatRequest) -> None:
    """Check the template arguments: they go to the template by name and must not replace what the server passes.

    Raises:
        RequestError: 400.
    """
    kwargs = request.chat_template_kwargs or {}
    path = "chat_template_kwargs"
    for name in kwargs:
        if name in _RESERVED_KWARGS or not name.isidentifier():
            raise invalid(f"`{path}` may not set {name!r:.50}.", f"{path}.{name:.50}")
    check_depth(kwargs, path)
    if len(msgspec.json.encode(kwargs)) > MAX_KWARGS_BYTES:
        raise invalid(f"`{path}` has more than {MAX_KWARGS_BYTES} bytes of JSON.", path)


def check_depth(value: Any, path: str, limit: int = MAX_DEPTH) -> None:
    """Check that `value` (JSON) is not nested too deeply to be written into a prompt or compiled.

    Iterative, so that the check itself cannot run out of stack.

    Raises:
        RequestError: 400, it is.
    """
    level = [value]
    for _ in range(limit):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise invalid(f"`{path}` is nested more than {limit} levels deep.", path)


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []
