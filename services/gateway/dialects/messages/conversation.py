"""Translation of a conversation: turns of blocks become the messages of a chat request, and errors find their way back.

system                       a message of the role system, before all others
turns of one role in a row   one turn, as Anthropic has it
tool_result blocks           a message of the role tool each; what stands around them, messages of the user
tool_use, thinking blocks    calls and reasoning of the assistant's message
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Literal, NoReturn

import msgspec

from services.gateway.dialects.messages.schemas import (
    Base64Source,
    Block,
    ContentSource,
    CountRequest,
    DocumentBlock,
    ImageBlock,
    RedactedThinkingBlock,
    SearchResultBlock,
    TextBlock,
    TextSource,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
    URLSource,
    VideoBlock,
)
from services.gateway.request.conversation import (
    FunctionCall,
    ImagePart,
    ImageURL,
    Message,
    Part,
    TextPart,
    ToolCall,
    VideoPart,
    VideoURL,
    stated_fields,
)
from shared.errors import RequestError, invalid

FAILED = "Error:"  # a line before the result of a tool that failed: the model's format has no other place for that

_PATH = re.compile(r"^messages\[(\d+)\](?:\.content)?(?:\[(\d+)\])?")
_SOURCE = re.compile(r"^\.(?:image|video)_url")


class Placed(msgspec.Struct, frozen=True):
    """Part of a message, and the path of the block that it came from."""

    part: Part
    path: str


class PlacedMessage(msgspec.Struct, frozen=True):
    """Message, and where it came from: its own path, and those of the parts of its content."""

    message: Message
    path: str
    parts: tuple[str, ...] = ()


class Conversation(msgspec.Struct, frozen=True):
    """Messages of a chat request, with the paths that they came from."""

    placed: list[PlacedMessage]

    @property
    def messages(self) -> list[Message]:
        return [one.message for one in self.placed]

    @property
    def continues(self) -> bool:
        """True if the last turn is the assistant's, which the answer goes on with."""
        return self.messages[-1].role == "assistant"

    def path_of(self, path: str) -> str:
        """Return the path in the body of what has this path in the chat request."""
        found = _PATH.match(path)
        if found is None:
            return path
        one, index = self.placed[int(found[1])], found[2]
        if index is None or int(index) >= len(one.parts):
            return one.path
        return one.parts[int(index)] + _SOURCE.sub(".source", path[found.end() :])


def read_conversation(request: CountRequest) -> Conversation:
    """Translate the conversation of a request.

    Raises:
        RequestError: 400 naming the block: it cannot be shown to the model, or not by its role.
    """
    placed = [_system(request.system, "system")] if request.system else []
    for role, group in groupby(enumerate(request.messages), key=lambda one: one[1].role):
        turns = list(group)
        if role == "assistant":
            placed.append(_assistant(turns))
        elif role == "user":
            placed += _user(turns)
        else:
            placed += [
                _system(_texts_of(turn, f"messages[{i}].content"), f"messages[{i}].content") for i, turn in turns
            ]
    conversation = Conversation(placed)
    _check_last(conversation, len(request.messages) - 1)
    return conversation


def _check_last(conversation: Conversation, last: int) -> None:
    if conversation.continues and conversation.messages[-1].tool_calls:
        path = f"messages[{last}]"
        raise invalid(f"`{path}`: the last turn calls tools; the next one must have their `tool_result` blocks.", path)


def _system(given: str | list[TextBlock], path: str) -> PlacedMessage:
    text = given if isinstance(given, str) else _joined(block.text for block in given)
    return PlacedMessage(Message("system", text), path)


def _texts_of(turn: Turn, path: str) -> str | list[TextBlock]:
    if isinstance(turn.content, str):
        return turn.content
    return [
        block if isinstance(block, TextBlock) else _misplaced("system", f"{path}[{j}]")
        for j, block in enumerate(turn.content)
    ]


def _joined(texts: Iterable[str]) -> str:
    """Join blocks of text: each begins on a line of its own, since nothing says that one goes on with the other."""
    return "\n".join(filter(None, texts))


def _misplaced(role: str, path: str) -> NoReturn:
    raise invalid(f"`{path}.type`: a turn of the role {role} cannot have a block of this type.", f"{path}.type")


# ------------------------------------------------------------------------------------------------------ the assistant


def _assistant(turns: Sequence[tuple[int, Turn]]) -> PlacedMessage:
    """Put together all that the model said: its texts in one, the calls behind them."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for path, block in _blocks(turns):
        match block:
            case TextBlock(text):
                texts.append(text)
            case ThinkingBlock(thinking):
                thoughts.append(thinking)
            case RedactedThinkingBlock():
                pass
            case ToolUseBlock(call_id, name, arguments):
                calls.append(ToolCall(FunctionCall(name, arguments), id=call_id, type="function"))
            case _:
                _misplaced("assistant", path)
    message = Message(
        "assistant", "".join(texts), tool_calls=calls or None, reasoning_content=_joined(thoughts) or None
    )
    return PlacedMessage(message, f"messages[{turns[0][0]}].content")


# ----------------------------------------------------------------------------------------------------------- the user


def _user(turns: Sequence[tuple[int, Turn]]) -> Iterator[PlacedMessage]:
    """Yield the user's messages, and between them a message for each result of a tool."""
    own = f"messages[{turns[0][0]}].content"
    blocks = list(_blocks(turns))
    if not blocks:
        yield PlacedMessage(Message("user", ""), own)
    for are_results, group in groupby(blocks, key=lambda one: isinstance(one[1], ToolResultBlock)):
        if are_results:
            yield from (_result(path, block) for path, block in group if isinstance(block, ToolResultBlock))
        else:
            yield _with_parts("user", own, [placed for path, block in group for placed in _parts(path, block)])


def _result(path: str, block: ToolResultBlock) -> PlacedMessage:
    inner = f"{path}.content"
    if isinstance(block.content, str):
        parts = [Placed(TextPart(block.content), inner)]
    else:
        shown = enumerate(block.content or ())
        parts = [placed for k, one in shown for placed in _parts(f"{inner}[{k}]", one)]
    if block.is_error:
        parts.insert(0, Placed(TextPart(FAILED), inner))
    return _with_parts("tool", inner, parts, block.tool_use_id)


def _with_parts(
    role: Literal["user", "tool"], path: str, parts: list[Placed], call: str | None = None
) -> PlacedMessage:
    own_lines: list[Part | str] = [
        TextPart(f"\n{one.part.text}")
        if isinstance(one.part, TextPart) and before is not None and isinstance(before.part, TextPart)
        else one.part
        for before, one in zip([None, *parts], parts, strict=False)
    ]
    return PlacedMessage(Message(role, own_lines, tool_call_id=call), path, tuple(one.path for one in parts))


def _parts(path: str, block: Block) -> Iterator[Placed]:
    """Yield the parts that show a block."""
    match block:
        case TextBlock(text):
            yield Placed(TextPart(text), path)
        case ImageBlock(source):
            yield Placed(ImagePart(ImageURL(_url(source), **stated_fields(source)), **stated_fields(block)), path)
        case VideoBlock(source):
            yield Placed(VideoPart(VideoURL(_url(source), **stated_fields(source)), **stated_fields(block)), path)
        case DocumentBlock():
            yield Placed(TextPart(_document(block, path)), path)
        case SearchResultBlock():
            _refuse_citations(block, path)
            text = _joined([block.title, block.source, *(one.text for one in block.content)])
            yield Placed(TextPart(text), path)
        case _:
            _misplaced("user", path)


def _blocks(turns: Iterable[tuple[int, Turn]]) -> Iterator[tuple[str, Block]]:
    """Yield the blocks of turns with their paths; a content that is text is one block."""
    for index, turn in turns:
        path = f"messages[{index}].content"
        if isinstance(turn.content, str):
            yield path, TextBlock(turn.content)
        else:
            yield from ((f"{path}[{j}]", block) for j, block in enumerate(turn.content))


def _url(source: Base64Source | URLSource) -> str:
    return source.url if isinstance(source, URLSource) else f"data:{source.media_type};base64,{source.data}"


def _document(block: DocumentBlock, path: str) -> str:
    _refuse_citations(block, path)
    match block.source:
        case TextSource(data):
            text = data
        case ContentSource(content):
            text = content if isinstance(content, str) else _joined(one.text for one in content)
        case _:
            raise _unsupported("a document that is not text; send its pages as images", f"{path}.source")
    return _joined([block.title or "", block.context or "", text])


def _refuse_citations(block: DocumentBlock | SearchResultBlock, path: str) -> None:
    if block.citations is not None and block.citations.enabled:
        raise _unsupported("a document that is to be cited", f"{path}.citations")


def _unsupported(what: str, path: str) -> RequestError:
    return invalid(f"`{path}`: this server does not support {what}.", path, "unsupported_parameter")
