"""From a conversation to a prompt: template variables, rendering, tokenisation around the places of media."""

import msgspec

from services.gateway.request.media import Item
from services.gateway.request.schemas import ChatRequest, Message, TextPart, Tool, ToolCall
from services.gateway.request.shield import ControlTexts
from services.gateway.request.template import Template
from services.gateway.request.thinking import wanted
from services.gateway.request.validate import check_depth
from shared.errors import internal, invalid
from shared.messages import MediaKind
from shared.model.tokenizer import Tokenizer

PLACES: dict[str, MediaKind] = {"<|image@placeholder|>": "image", "<|video@placeholder|>": "video"}
THINK, THINK_END = "<think>", "</think>"
_PART_TYPES: dict[MediaKind, str] = {"image": "image_url", "video": "video_url"}


class Prompt(msgspec.Struct, frozen=True):
    """`segments[i]` comes before media i; there is one more segment than media."""

    segments: tuple[list[int], ...]
    thinking: bool  # it ends inside an open <think>

    def text_tokens(self) -> int:
        """Tokens of the text alone."""
        return sum(map(len, self.segments))


class ChatFormat:
    """One checkpoint's way of writing a conversation as tokens. Safe to use from several threads."""

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._control = tokenizer.control
        self._texts = ControlTexts([*self._control, *PLACES, THINK, THINK_END])

    def prompt(self, request: ChatRequest, media: list[Item]) -> Prompt:
        """The tokens of the conversation, up to where the answer begins.

        Raises:
            RequestError: 400, the conversation is not one; 500, the template lost or invented media.
        """
        mark = self._texts.mark()
        rendered = self._template.render(self._texts.hide(variables(request, media), mark))
        segments: list[list[int]] = [[]]
        places: list[MediaKind] = []
        thinking = False
        for text, is_control in self._texts.split(rendered, mark):
            if not is_control:
                segments[-1] += self._tokenizer.encode_text(text)
            elif text in PLACES:
                places.append(PLACES[text])
                segments.append([])
            else:
                segments[-1] += self._control_ids(text)
                thinking = text == THINK or (thinking and text != THINK_END)
        if places != [item.kind for item in media]:
            raise internal(
                f"The chat template {self._template.name} wrote {len(places)} places for media where the conversation "
                f"has {len(media)}, or wrote them in another order."
            )
        return Prompt(tuple(segments), thinking)

    def _control_ids(self, text: str) -> list[int]:
        """A vocabulary need not have <think> as one token; then it is what its text is."""
        token = self._control.get(text)
        return self._tokenizer.encode_text(text) if token is None else [token]


def variables(request: ChatRequest, media: list[Item]) -> dict[str, object]:
    """What the template is given. Media stand for themselves: their URLs and bytes never enter the prompt."""
    kinds = {item.part: item.kind for item in media}
    given: dict[str, object] = dict(request.chat_template_kwargs or {})
    given["messages"] = [_message(message, f"messages[{i}]", kinds) for i, message in enumerate(request.messages)]
    given["tools"] = [_tool(tool) for tool in request.tools or ()] if request.tool_choice != "none" else []
    given["tools"] = given["tools"] or None
    given["add_generation_prompt"] = True
    thinking = wanted(request)
    given.pop("enable_thinking", None)
    options = dict((request.chat_template_kwargs or {}).get("options") or {})
    options.pop("thinking_mode", None)
    if thinking is not None:
        given["enable_thinking"] = thinking
        options["thinking_mode"] = "open" if thinking else "close"
    if options:
        given["options"] = options
    else:
        given.pop("options", None)
    return given


def _message(message: Message, path: str, kinds: dict[str, MediaKind]) -> dict[str, object]:
    made: dict[str, object] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _content(message, f"{path}.content", kinds),
    }
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if reasoning := message.reasoning_content or message.reasoning:
        made["reasoning_content"] = reasoning
    if message.tool_calls:
        made["tool_calls"] = [_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    return made


def _content(message: Message, path: str, kinds: dict[str, MediaKind]) -> str | list[dict[str, object]]:
    """A string wherever there is text only: the template writes nothing between parts, and every template takes one."""
    content = message.content
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return msgspec.json.encode(content).decode()
    parts: list[dict[str, object]] = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else _place(kinds[f"{path}[{i}]"])
        for i, part in enumerate(content)
    ]
    if all(isinstance(part, TextPart) for part in content):
        return "".join(str(part["text"]) for part in parts)
    return parts


def _place(kind: MediaKind) -> dict[str, object]:
    return {"type": _PART_TYPES[kind], _PART_TYPES[kind]: {"url": ""}}


def _call(call: ToolCall, path: str) -> dict[str, object]:
    """Templates write arguments as JSON, so they are given as an object even where the client sent its text."""
    arguments, path = call.function.arguments, f"{path}.function.arguments"
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, object])
        except (msgspec.DecodeError, RecursionError):
            raise invalid(f"`{path}` must be the JSON text of an object.", path) from None
    check_depth(arguments, path)
    made: dict[str, object] = {"type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
    return made if call.id is None else {"id": call.id, **made}


def _tool(tool: Tool) -> dict[str, object]:
    """The order of keys the model was trained with, whatever the client's."""
    function: dict[str, object] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    return {"type": tool.type, "function": function}
