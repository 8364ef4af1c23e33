"""Prompt of a conversation: template variables, rendering, tokenisation around the placeholders of media."""

import msgspec

from services.gateway.request.media import MediaItem
from services.gateway.request.schemas import ChatRequest, Message, TextPart, Tool, ToolCall
from services.gateway.request.shield import ControlTexts
from services.gateway.request.template import Template
from services.gateway.request.thinking import requested_thinking
from services.gateway.request.validate import check_depth
from shared.errors import internal, invalid
from shared.messages import MediaKind
from shared.model.tokenizer import Tokenizer

PLACEHOLDERS: dict[str, MediaKind] = {"<|image@placeholder|>": "image", "<|video@placeholder|>": "video"}
THINK, THINK_END = "<think>", "</think>"
_PART_TYPES: dict[MediaKind, str] = {"image": "image_url", "video": "video_url"}


class Prompt(msgspec.Struct, frozen=True):
    """Token ids of a prompt: `segments[i]` comes before media i, so there is one more segment than media."""

    segments: tuple[list[int], ...]
    thinking: bool  # the prompt ends inside an open <think>

    def text_tokens(self) -> int:
        """Count the tokens of the text, without those that media will take."""
        return sum(map(len, self.segments))


class ChatFormat:
    """Chat format of one checkpoint: its template and its tokenizer. Safe to use from several threads."""

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._control = tokenizer.control
        self._texts = ControlTexts([*self._control, *PLACEHOLDERS, THINK, THINK_END])

    def build_prompt(self, request: ChatRequest, media: list[MediaItem]) -> Prompt:
        """Tokenise the conversation, up to where the answer begins.

        Raises:
            RequestError: 400, the template refuses the conversation; 500, the template lost or invented media.
        """
        mark = self._texts.mark()
        rendered = self._template.render(self._texts.hide(template_variables(request, media), mark))
        segments: list[list[int]] = [[]]
        found: list[MediaKind] = []
        thinking = False
        for text, is_control in self._texts.split(rendered, mark):
            if not is_control:
                segments[-1] += self._tokenizer.encode_text(text)
            elif text in PLACEHOLDERS:
                found.append(PLACEHOLDERS[text])
                segments.append([])
            else:
                segments[-1] += self._control_ids(text)
                thinking = text == THINK or (thinking and text != THINK_END)
        if found != [item.kind for item in media]:
            raise internal(
                f"The chat template {self._template.name} wrote {len(found)} placeholders of media for a conversation "
                f"with {len(media)}, or wrote them in another order."
            )
        return Prompt(tuple(segments), thinking)

    def _control_ids(self, text: str) -> list[int]:
        """Return the ids of a control text. A vocabulary may lack <think> as a token; then it is tokenised as text."""
        token = self._control.get(text)
        return self._tokenizer.encode_text(text) if token is None else [token]


def template_variables(request: ChatRequest, media: list[MediaItem]) -> dict[str, object]:
    """Return the template's variables. They mark where media are: no URL and no bytes ever enter the prompt."""
    kinds = {item.part: item.kind for item in media}
    variables: dict[str, object] = dict(request.chat_template_kwargs or {})
    variables["messages"] = [_message(message, f"messages[{i}]", kinds) for i, message in enumerate(request.messages)]
    variables["tools"] = [_tool(tool) for tool in request.tools or ()] if request.tool_choice != "none" else []
    variables["tools"] = variables["tools"] or None
    variables["add_generation_prompt"] = True
    thinking = requested_thinking(request)
    variables.pop("enable_thinking", None)
    options = dict((request.chat_template_kwargs or {}).get("options") or {})
    options.pop("thinking_mode", None)
    if thinking is not None:
        variables["enable_thinking"] = thinking
        options["thinking_mode"] = "open" if thinking else "close"
    if options:
        variables["options"] = options
    else:
        variables.pop("options", None)
    return variables


def _message(message: Message, path: str, kinds: dict[str, MediaKind]) -> dict[str, object]:
    fields: dict[str, object] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _content(message, f"{path}.content", kinds),
    }
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if reasoning := message.reasoning_content or message.reasoning:
        fields["reasoning_content"] = reasoning
    if message.tool_calls:
        fields["tool_calls"] = [_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    return fields


def _content(message: Message, path: str, kinds: dict[str, MediaKind]) -> str | list[dict[str, object]]:
    """Return the content, as a string if it is text only: all templates take one and write nothing between parts."""
    content = message.content
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return msgspec.json.encode(content).decode()
    parts: list[dict[str, object]] = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else _media_part(kinds[f"{path}[{i}]"])
        for i, part in enumerate(content)
    ]
    if all(isinstance(part, TextPart) for part in content):
        return "".join(str(part["text"]) for part in parts)
    return parts


def _media_part(kind: MediaKind) -> dict[str, object]:
    return {"type": _PART_TYPES[kind], _PART_TYPES[kind]: {"url": ""}}


def _call(call: ToolCall, path: str) -> dict[str, object]:
    """Return a tool call. Its arguments become an object if the client sent JSON text: templates write the JSON."""
    arguments, path = call.function.arguments, f"{path}.function.arguments"
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, object])
        except (msgspec.DecodeError, RecursionError):
            raise invalid(f"`{path}` must be the JSON text of an object.", path) from None
    check_depth(arguments, path)
    fields: dict[str, object] = {"type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
    return fields if call.id is None else {"id": call.id, **fields}


def _tool(tool: Tool) -> dict[str, object]:
    """Return a tool with its keys in the order that the model was trained with, whatever the client's order."""
    function: dict[str, object] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    return {"type": tool.type, "function": function}
