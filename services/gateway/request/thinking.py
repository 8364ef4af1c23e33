"""The client's choice of whether the model thinks before it answers, from any of the fields that clients use."""

from collections.abc import Mapping
from typing import Any

from services.gateway.request.schemas import ChatRequest
from shared.errors import invalid

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def requested_thinking(request: ChatRequest) -> bool | None:
    """Return the client's choice; None if it made none, and the template's default applies.

    The most specific field wins: `enable_thinking`, then `chat_template_kwargs.enable_thinking`, then
    `chat_template_kwargs.options.thinking_mode`, then `metadata.enable_thinking`, then `reasoning_effort`.

    Raises:
        RequestError: 400, a field is neither on nor off.
    """
    effort = request.reasoning_effort
    if effort is not None and effort not in EFFORTS:
        raise invalid(f"`reasoning_effort` must be one of {', '.join(EFFORTS)}, not {effort!r}.", "reasoning_effort")
    kwargs = request.chat_template_kwargs or {}
    options = kwargs.get("options")
    if options is not None and not isinstance(options, dict):
        raise invalid("`chat_template_kwargs.options` must be an object.", "chat_template_kwargs.options")
    choices = (
        request.enable_thinking,
        _read_switch(kwargs, "enable_thinking", "chat_template_kwargs"),
        _read_switch(options or {}, "thinking_mode", "chat_template_kwargs.options"),
        _read_switch(request.metadata or {}, "enable_thinking", "metadata"),
        None if effort is None else effort != "none",
    )
    return next((choice for choice in choices if choice is not None), None)


def _read_switch(values: Mapping[str, Any], field: str, parent: str) -> bool | None:
    value = values.get(field)
    if value is None or isinstance(value, bool):
        return value
    if value in ("open", "true", "close", "false"):
        return value in ("open", "true")
    path = f"{parent}.{field}"
    raise invalid(f'`{path}` must be a boolean, "open" or "close", not {value!r:.50}.', path)
