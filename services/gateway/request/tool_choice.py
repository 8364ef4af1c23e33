"""Which tools the model may or must call, from the forms in which clients say so, and the grammar of such calls.

    auto, none, required        as strings, or as {"type": ...}; `any` is Mistral's word for required
    {"type": "function", ...}   one tool, by name: exactly one call of it; `tool` is Anthropic's word for function
    {"type": "allowed_tools"}   a mode, and the tools that it is about; the others are offered and cannot be called

A call is written in the model's own format (docs/parsing.md), its arguments by the tool's schema. So the arguments of
forced calls, and of tools that are `strict`, always validate.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from services.gateway.request.conversation import Tool
from services.gateway.request.schemas import ChatRequest
from shared.errors import RequestError, invalid
from shared.grammar.structural_tag import Format, InOrder, JsonText, Regex, SeparatedTags, Tag, TriggeredTags

Mode = Literal["auto", "none", "required"]

_MODES: dict[str, Mode] = {"auto": "auto", "none": "none", "required": "required", "any": "required"}
_CALL = "<tool_call>"
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class ToolChoice(msgspec.Struct, frozen=True):
    """Choice of tools. `tools` are those that may be called; none with the mode "none"."""

    mode: Mode
    tools: tuple[Tool, ...] = ()
    named: bool = False  # one tool, by its name
    limited: bool = False  # other tools are offered

    @property
    def as_offered(self) -> bool:
        """True if every tool may be called, and none must be."""
        return self.mode == "auto" and not self.limited


def read_tool_choice(request: ChatRequest) -> ToolChoice:
    """Return the choice that a request makes; without one it is auto.

    Raises:
        RequestError: 400, it is none of the forms, or is about a tool that is not offered.
    """
    tools = tuple(request.tools or ())
    given = "auto" if request.tool_choice is None else request.tool_choice
    if isinstance(given, dict) and _is_of_one_tool(given):
        return ToolChoice("required", _find(tools, [given], "tool_choice"), named=True, limited=len(tools) > 1)
    if isinstance(given, dict) and given.get("type") == "allowed_tools":
        return _read_allowed(tools, given)
    mode = _read_mode(given.get("type") if isinstance(given, dict) else given, "tool_choice")
    if mode == "required" and not tools:
        raise invalid("`tool_choice` asks for a call, but `tools` is empty.", "tool_choice")
    return ToolChoice(mode, () if mode == "none" else tools)


def call_format(choice: ToolChoice, parallel: bool) -> Format | None:
    """Return the format of calls, or of text with calls where they are not forced; None if any text will do.

    Raises:
        ValueError: the parameters of a tool are no object.
    """
    if choice.mode == "required":
        return _calls(_tags(choice.tools, forced=True), once=choice.named or not parallel)
    strict = any(tool.function.strict for tool in choice.tools)
    if choice.mode == "none" or not (strict or choice.limited):
        return None
    return TriggeredTags([_CALL], _tags(choice.tools), stop_after_first=not parallel)


def optional_calls(choice: ToolChoice, parallel: bool) -> Format | None:
    """Return the format of calls in place of an answer that has a grammar of its own; None if no tool may be called."""
    return _calls(_tags(choice.tools), once=not parallel) if choice.tools else None


def _calls(tags: list[Tag], once: bool) -> Format:
    """Return the format of one call, or of several.

    The model was trained to end each call with a line end, the last one too: without it there, it would have to go on
    with another call, and another.
    """
    calls = SeparatedTags(tags, "\n", True, once)
    return calls if once else InOrder([calls, Regex("\n?")])


def _is_of_one_tool(given: dict[str, Any]) -> bool:
    kind = given.get("type")
    return kind in ("function", "tool") or (kind is None and "function" in given)


def _read_allowed(tools: Sequence[Tool], given: dict[str, Any]) -> ToolChoice:
    path = "tool_choice.allowed_tools"
    allowed = given.get("allowed_tools", given)
    names = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, dict) for name in names):
        raise invalid(f"`{path}` must have a `mode` and a list `tools`.", path)
    found = _find(tools, names, f"{path}.tools")
    mode = _read_mode(allowed.get("mode") or "auto", f"{path}.mode")
    return ToolChoice(mode, () if mode == "none" else found, limited=len(found) < len(tools))


def _read_mode(given: Any, path: str) -> Mode:
    if not isinstance(given, str) or given not in _MODES:
        raise invalid(f"`{path}` must be auto, none, required, or a tool; not {given!r:.50}.", path)
    return _MODES[given]


def _find(tools: Sequence[Tool], named: Sequence[dict[str, Any]], path: str) -> tuple[Tool, ...]:
    """Return the tools that are named, in the order in which they are offered."""
    names = [_name(one, path) for one in named]
    offered = {tool.function.name for tool in tools}
    for name in names:
        if name not in offered:
            raise invalid(f"`{path}` names {name!r:.70}, which is not one of `tools`.", path)
    return tuple(tool for tool in tools if tool.function.name in names)


def _name(given: dict[str, Any], path: str) -> str:
    function = given.get("function", given)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _unnamed(path)
    return name


def _unnamed(path: str) -> RequestError:
    return invalid(f'`{path}` must name a function: {{"type": "function", "function": {{"name": ...}}}}.', path)


def _tags(tools: Sequence[Tool], forced: bool = False) -> list[Tag]:
    """Return a tag for each tool. Arguments follow the schema if calls are forced or the tool is strict."""
    return [
        Tag(
            f'{_CALL}\n{{"name": "{tool.function.name}", "arguments": ',
            JsonText(arguments_schema(tool) if forced or tool.function.strict else {"type": "object"}),
            "}\n</tool_call>",
        )
        for tool in tools
    ]


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool's arguments, which are always an object.

    Raises:
        ValueError: it describes something else.
    """
    schema = tool.function.parameters
    if not schema:
        return _NO_ARGUMENTS
    return object_schema(schema, f"the arguments of {tool.function.name}")


def object_schema(schema: dict[str, Any], what: str) -> dict[str, Any]:
    """Return a schema of an object; where it does not say so, it describes any value.

    Raises:
        ValueError: it describes something else; `what` is in the error's text.
    """
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ValueError(f"{what} must be an object, not {kind!r:.50}")
    return {**schema, "type": "object"}
