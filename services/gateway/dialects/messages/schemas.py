"""JSON schema of the Messages API's bodies: types and plain ranges.

A block has the type `text`, `image` and so on; one of another type is refused, by its type. What a block says of
caching is not read: prefixes are cached whoever asks for it.
"""

from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from services.gateway.request.conversation import PixelRange, Sampling
from services.gateway.request.model_names import MAX_CHARS
from services.gateway.request.schemas import (
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOKENS,
    MAX_TOOLS,
    Fraction,
    Positive,
    Wide,
)

Effort = Literal["low", "medium", "high", "xhigh", "max"]


class Base64Source(Sampling, frozen=True, tag_field="type", tag="base64"):
    """An image, a video, or a document. What it is to be brought to is an extension here and in the next two, as the
    chat API has it beside a link or in the object with it."""

    data: str
    media_type: Annotated[str, Meta(pattern=r"^[\w.+-]+/[\w.+-]+\Z", max_length=100)]


class URLSource(Sampling, frozen=True, tag_field="type", tag="url"):
    url: str


class TextSource(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    data: str


class TextBlock(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ContentSource(msgspec.Struct, frozen=True, tag_field="type", tag="content"):
    content: str | list[TextBlock]


class ImageBlock(PixelRange, frozen=True, tag_field="type", tag="image"):
    source: Base64Source | URLSource


class VideoBlock(Sampling, frozen=True, tag_field="type", tag="video"):
    """Extension: a video, as an image is given."""

    source: Base64Source | URLSource


class Citations(msgspec.Struct, frozen=True):
    enabled: bool | None = None  # refused where true


class DocumentBlock(msgspec.Struct, frozen=True, tag_field="type", tag="document"):
    """A document. Those of text are shown as text, the others are refused."""

    source: TextSource | ContentSource | Base64Source | URLSource
    title: str | None = None
    context: str | None = None
    citations: Citations | None = None


class SearchResultBlock(msgspec.Struct, frozen=True, tag_field="type", tag="search_result"):
    source: str
    title: str
    content: list[TextBlock]
    citations: Citations | None = None


class ThinkingBlock(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    """Reasoning that the model once wrote. Its signature is not read."""

    thinking: str


class RedactedThinkingBlock(msgspec.Struct, frozen=True, tag_field="type", tag="redacted_thinking"):
    """Reasoning that only another server can read, so that it is left out."""


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: Any = None


ShownBlock = TextBlock | ImageBlock | VideoBlock | DocumentBlock | SearchResultBlock


class ToolResultBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[ShownBlock] | None = None
    is_error: bool | None = None


Block = ShownBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class Turn(msgspec.Struct, frozen=True):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct, frozen=True):
    """A tool that the client runs. Those that Anthropic's servers run, or define, have another `type`."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}\Z")]
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    type: str | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonSchema(msgspec.Struct, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Any] | bool


class OutputConfig(msgspec.Struct, frozen=True):
    effort: Effort | None = None
    format: JsonSchema | None = None


class Metadata(msgspec.Struct, frozen=True):
    user_id: str | None = None


class ContextEdit(msgspec.Struct, frozen=True):
    type: str


class ContextManagement(msgspec.Struct, frozen=True):
    """Parts of the conversation to be left out of the prompt. Only that of thinking is: the template does so anyway."""

    edits: list[ContextEdit] | None = None


class CountRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/messages/count_tokens: the fields that the prompt is made of."""

    messages: Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: Annotated[str, Meta(max_length=MAX_CHARS)] | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonSchema | None = None  # what `output_config.format` was called before
    context_management: ContextManagement | None = None


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """The body of POST /v1/messages: all fields that do something."""

    max_tokens: Positive
    stream: bool | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Meta(max_length=MAX_STOP_CHARS)]], Meta(max_length=MAX_STOPS)] | None
    ) = None
    temperature: Wide | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | None = None
    metadata: Metadata | None = None


# Known fields that are refused, but for values that ask for nothing, as in services/gateway/request/unsupported.py.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "mcp_servers": ([],),
    "container": (),
    "speed": ("standard",),
    "compaction": (),
    "fallbacks": ([],),
}
# Accepted whatever they say. `cache_control` is among them since all prefixes are cached, and `diagnostics` since there
# is nothing to say about that.
NO_EFFECT = frozenset(
    {"cache_control", "service_tier", "inference_geo", "diagnostics", "user_profile_id", "workspace_id", "betas"}
)

_REFUSED = [(name, Any, None) for name in NEUTRAL_VALUES]
_Message = msgspec.defstruct("_Message", _REFUSED, bases=(MessagesRequest,), frozen=True, kw_only=True)
_Count = msgspec.defstruct("_Count", _REFUSED, bases=(CountRequest,), frozen=True, kw_only=True)

# They decode the fields that are refused, too, as attributes beyond those of the structs. Not strict, as chat's is not.
message_decoder = msgspec.json.Decoder(cast(type[MessagesRequest], _Message), strict=False)
count_decoder = msgspec.json.Decoder(cast(type[CountRequest], _Count), strict=False)

MESSAGE_FIELDS = frozenset(_Message.__struct_fields__) | NO_EFFECT
# Clients count what they are about to send, and may leave the other fields in.
COUNT_FIELDS = MESSAGE_FIELDS
