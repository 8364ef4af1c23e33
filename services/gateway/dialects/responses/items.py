"""Input items as they are listed: with ids, and with the fields that OpenAI's have."""

from typing import Any

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_WITH_STATUS = ("function_call", "function_call_output")


def listed_item(item: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Return an input item with an id, its own or one that ends in `suffix`."""
    kind = item.get("type") or "message"
    listed = {"id": f"{_PREFIXES[kind]}_in_{suffix}", **item, "type": kind}
    if kind == "message":
        listed["content"] = _content(item["content"], item["role"])
    if kind == "reasoning":
        listed.setdefault("summary", [])
    if kind in _WITH_STATUS or item.get("role") == "assistant":
        listed.setdefault("status", "completed")
    return listed


def _content(content: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "output_text" if role == "assistant" else "input_text", "text": content}]
    return [_part(part) for part in content]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "input_image":
        return {"detail": "auto", **part}
    if part["type"] == "output_text":
        return {"annotations": [], "logprobs": [], **part}
    return part
