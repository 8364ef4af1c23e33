"""Whether the client wants the model to think, among the several ways clients have of saying so."""

from collections.abc import Mapping
from typing import Any

from services.gateway.request.schemas import ChatRequest
from shared.errors import invalid

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def wanted(request: ChatRequest) -> bool | None:
    """True or False as the client said, None where it said nothing and the template's default holds.

    The most specific field wins: `enable_thinking`, then `chat_template_kwargs.enable_thinking`, then
    `chat_template_kwargs.options.thinking_mode`, then `metadata.enable_thinking`, then `reasoning_effort`.

    Raises:
        RequestError: 400, a field has a value that says neither.
    """
    effort = request.reasoning_effort
    if effort is not None and effort not in EFFORTS:
        raise invalid(f"`reasoning_effort` must be one of {', '.join(EFFORTS)}, not {effort!r}.", "reasoning_effort")
    kwargs = request.chat_template_kwargs or {}
    options = kwargs.get("options")
    if options is not None and not isinstance(options, dict):
        raise invalid("`chat_template_kwargs.options` must be an object.", "chat_template_kwargs.options")
    said = (
        request.enable_thinking,
        _switch(kwargs, "enable_thinking", "chat_template_kwargs"),
        _switch(options or {}, "thinking_mode", "chat_template_kwargs.options"),
        _switch(request.metadata or {}, "enable_thinking", "metadata"),
        None if effort is None else effort != "none",
    )
    return next((answer for answer in said if answer is not None), None)


def _switch(values: Mapping[str, Any], field: str, where: str) -> bool | None:
    value = values.get(field)
    if value is None or isinstance(value, bool):
        return value
    if value in ("open", "true", "close", "false"):
        return value in ("open", "true")
    path = f"{where}.{field}"
    raise invalid(f'`{path}` must be a boolean, "open" or "close", not {value!r:.50}.', path)
