"""The object `response`: its request's fields, its status, and its output once it has ended."""

from typing import Any

import msgspec

from services.gateway.dialects.responses.answered import Answered, ItemForm, item_form, output_items
from shared.errors import Failure
from shared.messages import Usage

PREFIX = "resp_"

_RATE_LIMITED = 429
_SERVER_ERROR = 500


class Head(msgspec.Struct, frozen=True):
    """Beginning of a response: all that it says before it has an answer."""

    request_id: str
    created: int  # unix seconds
    model: str
    echo: dict[str, Any]  # fields that repeat the request's

    @property
    def id(self) -> str:
        """The id of the response."""
        return PREFIX + self.request_id

    @property
    def form(self) -> ItemForm:
        """The form of its items."""
        return item_form(self.echo)


def unanswered(head: Head, status: str) -> dict[str, Any]:
    """Return a response that is queued or in progress."""
    return _resource(head, status, None)


def resource(head: Head, answered: Answered) -> dict[str, Any]:
    """Return a response that has ended."""
    return _resource(head, answered.status, answered)


def _resource(head: Head, status: str, answered: Answered | None) -> dict[str, Any]:
    done = answered is not None and answered.status in ("completed", "incomplete")
    return {
        "id": head.id,
        "object": "response",
        "created_at": head.created,
        "completed_at": answered.completed_at if answered is not None and status == "completed" else None,
        "status": status,
        "error": None if answered is None or answered.failure is None else _error(answered.failure),
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": head.model,
        "output": output_items(head.request_id, answered, head.form) if answered is not None and done else [],
        **head.echo,
        "usage": None if answered is None or answered.usage is None else usage(answered.usage),
    }


def usage(given: Usage) -> dict[str, Any]:
    """Return token counts in the words of this API."""
    return {
        "input_tokens": given.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": given.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": given.image_tokens,
            "video_tokens": given.video_tokens,
        },
        "output_tokens": given.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": given.reasoning_tokens},
        "total_tokens": given.prompt_tokens + given.completion_tokens,
    }


def _error(failure: Failure) -> dict[str, Any]:
    """Return a failure with one of the codes that this API has; ours is in the type."""
    if failure.status >= _SERVER_ERROR:
        code = "server_error"
    else:
        code = "rate_limit_exceeded" if failure.status == _RATE_LIMITED else "invalid_prompt"
    return {"code": code, "message": failure.message, "param": failure.param, "type": failure.code or failure.type}
