"""Tools of this API: functions, alone or grouped in namespaces.

The model is told of the function `close` in the namespace `agents` as of `agents.close`, and its calls of that name are
shown as this API has them: a name and a namespace.
"""

from collections.abc import Sequence
from typing import Any

from services.gateway.dialects.responses.body import NamespaceTool, convert, unsupported
from services.gateway.request.conversation import Function, Tool
from services.gateway.request.schemas import MAX_TOOLS
from services.gateway.request.validate import check_depth
from shared.errors import RequestError, invalid

_SHOWN = ("name", "description", "parameters", "strict")


def declared_tools(given: Sequence[dict[str, Any]]) -> list[tuple[Tool, str]]:
    """Return the functions of the field `tools`, and the path of each in it.

    Raises:
        RequestError: 400 naming a tool that is none, or whose name could be another's.
    """
    found: list[tuple[Tool, str]] = []
    for index, raw in enumerate(given):
        path = f"tools[{index}]"
        if raw.get("type") == "namespace":
            found += _grouped(convert(raw, NamespaceTool, path), path)
        else:
            found.append((_tool(raw, path), path))
    if len(found) > MAX_TOOLS:
        raise invalid(f"`tools` has {len(found)} functions; at most {MAX_TOOLS} are accepted.", "tools")
    spaces = namespaces(given)
    for raw, path in ((raw, f"tools[{index}].name") for index, raw in enumerate(given)):
        if raw.get("type") == "function" and split_name(raw["name"], spaces)[0] is not None:
            raise invalid(f"`{path}`: {raw['name']!r:.70} reads as a function of one of the namespaces.", path)
    return found


def shown_tool(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a tool as an answer repeats it."""
    if raw["type"] == "namespace":
        tools = [shown_tool(tool) for tool in raw["tools"]]
        return {"type": "namespace", "name": raw["name"], "description": raw.get("description") or "", "tools": tools}
    return {"type": "function", **{name: raw.get(name) for name in _SHOWN}}


def chosen_tool(given: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Return the field `tool_choice` as the chat API has it.

    Raises:
        RequestError: 400 naming a choice that is not of functions.
    """
    if not isinstance(given, dict):
        return given
    if given.get("type") == "allowed_tools" and isinstance(given.get("tools"), list):
        return {**given, "tools": [_joined(tool) if isinstance(tool, dict) else tool for tool in given["tools"]]}
    if given.get("type") not in ("function", "allowed_tools"):
        text = f"`tool_choice.type`: {given.get('type')!r:.50} is not supported by this server; it has functions alone."
        raise invalid(text, "tool_choice.type", "unsupported_parameter")
    return _joined(given)


def namespaces(tools: Sequence[dict[str, Any]]) -> frozenset[str]:
    """Return the names of the namespaces among tools that were declared."""
    return frozenset(tool["name"] for tool in tools if tool.get("type") == "namespace")


def join_name(namespace: str | None, name: str) -> str:
    """Return the name that the model knows a function by."""
    return name if namespace is None else f"{namespace}.{name}"


def split_name(name: str, spaces: frozenset[str]) -> tuple[str | None, str]:
    """Return the namespace, if it has one, and the name of a function that the model calls."""
    namespace, dot, rest = name.partition(".")
    return (namespace, rest) if dot and namespace in spaces else (None, name)


def _grouped(group: NamespaceTool, path: str) -> list[tuple[Tool, str]]:
    found = []
    for index, raw in enumerate(group.tools):
        tool = _tool(raw, f"{path}.tools[{index}]")
        named = Function(
            join_name(group.name, tool.function.name),
            _described(group.description, tool.function.description),
            tool.function.parameters,
            tool.function.strict,
        )
        found.append((Tool(named, "function"), f"{path}.tools[{index}]"))
    return found


def _described(group: str | None, own: str | None) -> str | None:
    return f"{group}\n{own}" if group and own else own or group


def _tool(raw: dict[str, Any], path: str) -> Tool:
    if raw.get("type") != "function":
        raise _unknown_kind(raw, f"{path}.type")
    for field in ("defer_loading", "async", "output_schema"):
        if raw.get(field):
            raise unsupported(f"{path}.{field}")
    callers = raw.get("allowed_callers")
    if callers and not (isinstance(callers, list) and "direct" in callers):
        raise unsupported(f"{path}.allowed_callers")
    check_depth(raw, path)
    function = {name: raw[name] for name in _SHOWN if name in raw}
    return Tool(convert(function, Function, path), "function")


def _unknown_kind(raw: dict[str, Any], field: str) -> RequestError:
    text = f"`{field}`: tools of the type {raw.get('type')!r:.50} are not supported by this server."
    return invalid(text, field, "unsupported_parameter")


def _joined(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice with the name that the model knows."""
    namespace, name = choice.get("namespace"), choice.get("name")
    if not (isinstance(namespace, str) and isinstance(name, str)):
        return choice
    rest = {key: value for key, value in choice.items() if key != "namespace"}
    return {**rest, "name": join_name(namespace, name)}
