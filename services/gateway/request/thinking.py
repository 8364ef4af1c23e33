"""The client's choice of whether the model thinks before it answers, from any of the fields that clients use."""

from collections.abc import Mapping
from typing import Any

from services.gateway.request.schemas import ChatRequest, Thinking
from shared.errors import invalid

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def requested_thinking(request: ChatRequest) -> bool | None:
    """Return the client's choice; None if it made none, and the template's default applies.

    The most specific field wins: `enable_thinking`, `chat_template_kwargs.enable_thinking` and `.thinking`,
    `chat_template_kwargs.options.thinking_mode`, `metadata.enable_thinking`, `thinking`, `reasoning.enabled`, a budget
    of 0, `reasoning_effort`, `reasoning.effort`.

    Raises:
        RequestError: 400, a field is neither on nor off.
    """
    kwargs = request.chat_template_kwargs or {}
    options = kwargs.get("options")
    if options is not None and not isinstance(options, dict):
        raise invalid("`chat_template_kwargs.options` must be an object.", "chat_template_kwargs.options")
    choices = (
        request.enable_thinking,
        read_switch(kwargs, "enable_thinking", "chat_template_kwargs"),
        read_switch(kwargs, "thinking", "chat_template_kwargs"),
        read_switch(options or {}, "thinking_mode", "chat_template_kwargs.options"),
        read_switch(request.metadata or {}, "enable_thinking", "metadata"),
        _read_thinking(request),
        None if request.reasoning is None else request.reasoning.enabled,
        False if _first_budget(request) == 0 else None,
        _read_effort(request.reasoning_effort, "reasoning_effort"),
        _read_effort(None if request.reasoning is None else request.reasoning.effort, "reasoning.effort"),
    )
    return next((choice for choice in choices if choice is not None), None)


def thinking_budget(request: ChatRequest) -> int | None:
    """Return the most tokens of thinking that the client wants, if thinking is on; None: no limit.

    Raises:
        RequestError: 400, `reasoning_max_tokens` is 0.
    """
    if request.reasoning_max_tokens == 0:
        raise invalid("`reasoning_max_tokens` must be at least 1, or -1 for no limit.", "reasoning_max_tokens")
    budget = _first_budget(request)
    return budget if budget is not None and budget > 0 else None


def _first_budget(request: ChatRequest) -> int | None:
    thinking, reasoning = request.thinking, request.reasoning
    budgets = (
        request.reasoning_max_tokens,
        request.thinking_token_budget,
        request.thinking_budget,
        thinking.budget_tokens if isinstance(thinking, Thinking) else None,
        None if reasoning is None else reasoning.max_tokens,
    )
    return next((budget for budget in budgets if budget is not None), None)


def _read_thinking(request: ChatRequest) -> bool | None:
    if not isinstance(request.thinking, Thinking):
        return request.thinking
    return {"enabled": True, "disabled": False}.get(request.thinking.type or "")


def _read_effort(effort: str | None, path: str) -> bool | None:
    if effort is not None and effort not in EFFORTS:
        raise invalid(f"`{path}` must be one of {', '.join(EFFORTS)}, not {effort!r:.50}.", path)
    return None if effort is None else effort != "none"


def read_switch(values: Mapping[str, Any], field: str, parent: str) -> bool | None:
    """Return the boolean `parent.field`, in any of its spellings; None if it is not there.

    Raises:
        RequestError: 400, it is something else.
    """
    value = values.get(field)
    if value is None or isinstance(value, bool):
        return value
    if value in ("open", "true", "close", "false"):
        return value in ("open", "true")
    path = f"{parent}.{field}"
    raise invalid(f'`{path}` must be a boolean, "open" or "close", not {value!r:.50}.', path)
