"""Input items as the messages of a chat, and where in the items each part of a message stands.

What one turn of the model left (reasoning, a message, calls) is one message of the assistant. Items that come from
`previous_response_id` stand before those of `input`; errors about them name that field.
"""

import mimetypes
from collections.abc import Sequence
from typing import Any

import msgspec

from services.gateway.dialects.responses.body import (
    ITEMS,
    CallItem,
    CallOutputItem,
    Content,
    InputFile,
    InputImage,
    InputVideo,
    MessageItem,
    Part,
    ReasoningItem,
    RefusalText,
    convert,
    unsupported,
)
from services.gateway.dialects.responses.tools import join_name
from services.gateway.request import conversation as chat
from shared.errors import RequestError, invalid


class Conversation:
    """Messages that are made of items, one after the other."""

    def __init__(self) -> None:
        self.messages: list[chat.Message] = []
        self.names: dict[str, str] = {}  # path in the chat request -> path in this API's
        self._turn: chat.Message | None = None  # the assistant's, which the next item may belong to
        self._turn_path = ""

    def add_text(self, role: Any, text: str, path: str) -> None:
        """Append a message of text alone."""
        self.finish()
        self._append(chat.Message(role, text), path)

    def add_items(self, items: Sequence[dict[str, Any]], path: str, indexed: bool = True) -> None:
        """Append items; `path` is the field they are in. Not `indexed`: errors name that field alone.

        Raises:
            RequestError: 400 naming the item's field.
        """
        for index, item in enumerate(items):
            self._add_item(item, f"{path}[{index}]" if indexed else path, indexed)

    def finish(self) -> None:
        """Append what is still held."""
        if self._turn is not None:
            self._append(self._turn, self._turn_path)
            self._turn = None

    def _add_item(self, raw: dict[str, Any], path: str, indexed: bool) -> None:
        kind = raw.get("type") or "message"
        if not isinstance(kind, str) or kind not in ITEMS:
            field = f"{path}.type"
            text = f"`{field}`: items of the type {kind!r:.50} are not supported by this server."
            raise invalid(text, field, "unsupported_parameter")
        item = convert(raw, ITEMS[kind], path)
        match item:
            case MessageItem(role="assistant"):
                self._say(self._content(item.content, f"{path}.content"), path)
            case MessageItem():
                self._add_parts(chat.Message(item.role), item.content, path, "content", indexed)
            case ReasoningItem():
                self._think(_reasoning(item), path)
            case CallItem():
                self._call(item, path)
            case CallOutputItem():
                message = chat.Message("tool", tool_call_id=item.call_id)
                self._add_parts(message, item.output, path, "output", indexed)

    def _say(self, content: str | list[chat.Part], path: str) -> None:
        if self._turn is None or self._turn.content or self._turn.tool_calls:
            self._begin(path)
        self._change(content=content)

    def _think(self, text: str, path: str) -> None:
        if self._turn is None or self._turn.content or self._turn.tool_calls or self._turn.reasoning_content:
            self._begin(path)
        self._change(reasoning_content=text)

    def _call(self, item: CallItem, path: str) -> None:
        if self._turn is None:
            self._begin(path)
        assert self._turn is not None
        call = chat.ToolCall(
            chat.FunctionCall(join_name(item.namespace, item.name), item.arguments), id=item.call_id, type="function"
        )
        self._change(tool_calls=[*(self._turn.tool_calls or ()), call])

    def _begin(self, path: str) -> None:
        self.finish()
        self._turn, self._turn_path = chat.Message("assistant"), path

    def _change(self, **fields: Any) -> None:
        assert self._turn is not None
        self._turn = msgspec.structs.replace(self._turn, **fields)

    def _add_parts(self, message: chat.Message, content: Content, path: str, field: str, indexed: bool) -> None:
        self.finish()
        index = len(self.messages)
        parts = self._content(content, f"{path}.{field}" if indexed else path)
        self._append(msgspec.structs.replace(message, content=parts), path)
        if not indexed or isinstance(parts, str):
            return
        self.names[f"messages[{index}].content"] = f"{path}.{field}"
        for place, part in enumerate(parts):
            if isinstance(part, chat.FilePart):
                own = "file_data" if part.file.format is None else "file_url"
                self.names[f"messages[{index}].content[{place}].file"] = f"{path}.{field}[{place}].{own}"

    def _content(self, content: Content, path: str) -> str | list[chat.Part]:
        if isinstance(content, str):
            return content
        return [_part(part, f"{path}[{index}]") for index, part in enumerate(content)]

    def _append(self, message: chat.Message, path: str) -> None:
        self.names[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)


def _part(part: Part, path: str) -> chat.Part:
    match part:
        case InputImage():
            if part.image_url is None:
                raise _without(path, "image_url", part.file_id)
            return chat.ImagePart(part.image_url, **chat.stated_fields(part))
        case InputVideo():
            return chat.VideoPart(part.video_url, **chat.stated_fields(part))
        case InputFile():
            return _file(part, path)
        case RefusalText(refusal):
            return chat.TextPart(refusal)
    return chat.TextPart(part.text)


def _file(part: InputFile, path: str) -> chat.Part:
    options = chat.stated_fields(part)
    if part.file_data is not None:
        return chat.FilePart(chat.FileData(part.file_data), **options)
    if part.file_url is None:
        raise _without(path, "file_data", part.file_id)
    file = chat.FileData(part.file_url, format=_media_type(part.filename or part.file_url))
    return chat.FilePart(file, **options)


def _media_type(name: str) -> str:
    """Return the media type that a link's or a file's name tells; empty if none."""
    return mimetypes.guess_type(name)[0] or ""


def _without(path: str, field: str, file_id: str | None) -> RequestError:
    if file_id is not None:
        return unsupported(f"{path}.file_id")
    return invalid(f"Missing required field `{path}.{field}`.", f"{path}.{field}", "missing_required_parameter")


def _reasoning(item: ReasoningItem) -> str:
    return "\n".join(part.text for part in item.content or item.summary)
