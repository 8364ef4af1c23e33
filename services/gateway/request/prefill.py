"""Beginning of an answer that the client has written: the last message, if the request says that it is one."""

import msgspec

from services.gateway.request.conversation import MediaPart, ThinkingPart, part_text, reasoning_of
from services.gateway.request.schemas import ChatRequest
from shared.errors import invalid

FIELD = "continue_final_message"


class Prefill(msgspec.Struct, frozen=True):
    """Text that stands behind the generation prompt, so that the model goes on with it."""

    reasoning: str  # inside <think>, which it closes if there is content
    content: str


def read_prefill(request: ChatRequest) -> Prefill | None:
    """Return the beginning of the answer; None if the request has none.

    Raises:
        RequestError: 400, the last message is not an assistant's text, or `add_generation_prompt` is true as well.
    """
    field, last = _asking_field(request), request.messages[-1]
    if field is None:
        return None
    if request.add_generation_prompt:
        raise invalid(f"`{field}` and `add_generation_prompt` cannot both be true.", field)
    if last.role != "assistant" or last.tool_calls or last.function_call or isinstance(last.content, dict):
        raise invalid(f"`{field}` needs a last message of the assistant that is text alone.", field)
    if isinstance(last.content, list):
        parts = [part for part in last.content if not isinstance(part, MediaPart | ThinkingPart)]
        content = "".join(map(part_text, parts))
    else:
        content = last.content or ""
    return Prefill(reasoning_of(last).strip("\n"), content)


def _asking_field(request: ChatRequest) -> str | None:
    """Return the path of the field that says that the last message is a beginning; None if none does."""
    if request.continue_final_message:
        return FIELD
    marks = (name for name in ("prefix", "partial") if getattr(request.messages[-1], name))
    return next((f"messages[{len(request.messages) - 1}].{name}" for name in marks), None)
