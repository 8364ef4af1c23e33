"""Prompt of a conversation: template variables, rendering, tokenisation around the placeholders of media."""

from typing import Any

import msgspec

from services.gateway.request.conversation import (
    MediaPart,
    Message,
    ThinkingPart,
    Tool,
    ToolCall,
    part_text,
    reasoning_of,
)
from services.gateway.request.media import MediaItem
from services.gateway.request.prefill import read_prefill
from services.gateway.request.schemas import ChatRequest
from services.gateway.request.shield import ControlTexts
from services.gateway.request.template import RawText
from services.gateway.request.thinking import requested_thinking
from services.gateway.request.tool_choice import read_tool_choice
from services.gateway.request.validate import check_depth
from shared.errors import RequestError, internal, invalid
from shared.messages import MediaKind
from shared.model.tokenizer import Tokenizer

PLACEHOLDERS: dict[str, MediaKind] = {"<|image@placeholder|>": "image", "<|video@placeholder|>": "video"}
THINK, THINK_END = "<think>", "</think>"
MAX_TEMPLATE_CHARS = 256 << 10  # of a template that a request brings
_ROLES = {"developer": "system", "function": "tool"}  # how templates call what clients call otherwise
_PART_TYPES: dict[MediaKind, str] = {"image": "image_url", "video": "video_url"}


class Prompt(msgspec.Struct, frozen=True):
    """Token ids of a prompt: `segments[i]` comes before media i, so there is one more segment than media."""

    segments: tuple[list[int], ...]
    thinking: bool  # the prompt ends inside an open <think>

    def text_tokens(self) -> int:
        """Count the tokens of the text, without those that media will take."""
        return sum(map(len, self.segments))


class Rendering(msgspec.Struct, frozen=True):
    """Conversation that a template has to write, and the beginning of the answer that stands behind it."""

    variables: dict[str, object]  # with a mark in each of the client's strings, as in `prefill`
    mark: str
    prefill: str = ""
    own_template: str | None = None  # the request's, in place of the checkpoint's


class ChatFormat:
    """Chat format of one checkpoint: its tokenizer and the rules of prompts. Safe to use from several threads.

    A prompt is prepared, rendered by a template (`services/gateway/templates/renderer.py`), and tokenised.
    """

    def __init__(self, template_name: str, tokenizer: Tokenizer, trusts_requests: bool = False) -> None:
        """`trusts_requests`: a request may bring its own template."""
        self._template_name = template_name
        self._trusts_requests = trusts_requests
        self._tokenizer = tokenizer
        self._control = tokenizer.control
        self._texts = ControlTexts([*self._control, *PLACEHOLDERS, THINK, THINK_END])

    def prepare(self, request: ChatRequest, media: list[MediaItem]) -> Rendering:
        """Return the conversation, up to where the answer begins, as it goes to the template.

        Raises:
            RequestError: 400, the request brings a template that is too long or that the server does not allow.
        """
        own, field = request.chat_template, "chat_template"
        if own is not None and not self._trusts_requests:
            text = f"`{field}` is not allowed by this server; see the setting trust_request_chat_template."
            raise invalid(text, field, "unsupported_parameter")
        if own is not None and len(own) > MAX_TEMPLATE_CHARS:
            raise invalid(f"`{field}` has {len(own)} characters; the limit is {MAX_TEMPLATE_CHARS}.", field)
        mark = self._texts.mark()
        variables = self._texts.hide(template_variables(request, media), mark)
        return Rendering(variables, mark, self._prefill(request, mark), own)

    def _prefill(self, request: ChatRequest, mark: str) -> str:
        prefill = read_prefill(request)
        if prefill is None:
            return ""
        end = f"\n{THINK_END}\n\n" if prefill.reasoning and prefill.content else ""
        return f"{self._texts.hide(prefill.reasoning, mark)}{end}{self._texts.hide(prefill.content, mark)}"

    def tokenise(self, rendering: Rendering, rendered: str, media: list[MediaItem]) -> Prompt:
        """Return the tokens of a rendered prompt.

        Raises:
            RequestError: the template lost or invented media: 500, or 400 for the request's own.
        """
        segments: list[list[int]] = [[]]
        found: list[MediaKind] = []
        thinking = False
        for text, is_control in self._texts.split(rendered + rendering.prefill, rendering.mark):
            if not is_control:
                segments[-1] += self._tokenizer.encode_text(text)
            elif text in PLACEHOLDERS:
                found.append(PLACEHOLDERS[text])
                segments.append([])
            else:
                segments[-1] += self._control_ids(text)
                thinking = text == THINK or (thinking and text != THINK_END)
        if found != [item.kind for item in media]:
            raise template_failure(
                f"wrote {len(found)} placeholders of media for a conversation with {len(media)}, or wrote them in "
                "another order",
                self._template_name,
                rendering.own_template,
            )
        return Prompt(tuple(segments), thinking)

    def _control_ids(self, text: str) -> list[int]:
        """Return the ids of a control text. A vocabulary may lack <think> as a token; then it is tokenised as text."""
        token = self._control.get(text)
        return self._tokenizer.encode_text(text) if token is None else [token]


def template_failure(what: str, name: str, own: str | None) -> RequestError:
    """Return the error of a template that did `what`: the client's fault if it is its `own`, else the checkpoint's."""
    if own is None:
        return internal(f"The chat template {name} {what}.", "chat_template_error")
    return invalid(f"`chat_template` {what}.", "chat_template")


def template_variables(request: ChatRequest, media: list[MediaItem]) -> dict[str, object]:
    """Return the template's variables. They mark where media are: no URL and no bytes ever enter the prompt."""
    kinds = {item.part: item.kind for item in media}
    prefill = read_prefill(request)
    messages = request.messages if prefill is None else request.messages[:-1]
    variables: dict[str, object] = dict(request.chat_template_kwargs or {})
    variables["messages"] = [_message(message, f"messages[{i}]", kinds) for i, message in enumerate(messages)]
    offered = () if read_tool_choice(request).mode == "none" else request.tools or ()
    variables["tools"] = [_tool(tool) for tool in offered] or None
    variables["add_generation_prompt"] = prefill is not None or request.add_generation_prompt is not False
    thinking = requested_thinking(request)
    if prefill is not None and (prefill.reasoning or prefill.content):
        thinking = bool(prefill.reasoning)  # an answer that has begun was thought of before
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
        "role": _ROLES.get(message.role, message.role),
        "content": _content(message, f"{path}.content", kinds) or message.refusal or "",
    }
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if reasoning := reasoning_of(message):
        fields["reasoning_content"] = reasoning
    calls = message.tool_calls or ([ToolCall(message.function_call)] if message.function_call else [])
    if calls:
        fields["tool_calls"] = [_call(call) for call in calls]
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
        _media_part(kinds[f"{path}[{i}]"]) if isinstance(part, MediaPart) else {"type": "text", "text": part_text(part)}
        for i, part in enumerate(content)
        if not isinstance(part, ThinkingPart)
    ]
    if any(isinstance(part, MediaPart) for part in content):
        return parts
    return "".join(str(part["text"]) for part in parts)


def _media_part(kind: MediaKind) -> dict[str, object]:
    return {"type": _PART_TYPES[kind], _PART_TYPES[kind]: {"url": ""}}


def _call(call: ToolCall) -> dict[str, object]:
    """Return a tool call, of which the template writes name and arguments as JSON."""
    name, arguments = None, None
    if call.function is not None:
        name, arguments = call.function.name, _arguments(call.function.arguments)
    elif call.custom is not None:
        name, arguments = call.custom.name, _arguments(msgspec.json.encode(call.custom.input).decode())
    fields: dict[str, object] = {"type": "function", "function": {"name": name or "", "arguments": arguments}}
    return fields if call.id is None else {"id": call.id, **fields}


def _arguments(given: Any) -> Any:
    """Return a call's arguments as the value that the client's JSON text says, else as the text that they are.

    A limit may have cut them off, or the model may have written no JSON. It reads then what it wrote. A string is
    given as its JSON text, too: some templates write strings as they are.
    """
    if given is None or given == "":
        return {}
    text = given if isinstance(given, str) else msgspec.json.encode(given).decode()
    try:
        value = msgspec.json.decode(text)
        check_depth(value, "arguments")
    except (msgspec.DecodeError, RecursionError, RequestError):
        return RawText(text)
    return RawText(text) if isinstance(value, str) else value


def _tool(tool: Tool) -> dict[str, object]:
    """Return a tool with its keys in the order that the model was trained with, whatever the client's order."""
    function: dict[str, object] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    return {"type": "function", "function": function}
