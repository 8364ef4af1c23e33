"""JSON schema of the body of POST /v1/responses, and the fields of it that are refused by name."""

from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta

from services.gateway.request.conversation import PixelRange, Sampling, VideoURL
from services.gateway.request.model_names import MAX_CHARS
from services.gateway.request.schemas import (
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    ChatRequest,
    Fraction,
    Positive,
    Wide,
    decode_json,
    explained,
)
from shared.errors import RequestError, invalid

MAX_ITEMS = 4096  # of the input; a conversation of more messages is refused as the chat API refuses it
MAX_INCLUDES = 16
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512  # OpenAI's limits

# Extensions: fields of the chat API that mean the same here.
EXTENSIONS = (
    *("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "min_tokens"),
    *("stop", "stop_token_ids", "ignore_eos", "bad_words", "logit_bias", "structured_outputs"),
    *("cache_salt", "extra_key", "request_id"),
    *("enable_thinking", "thinking_token_budget", "chat_template_kwargs", "mm_processor_kwargs"),
)
# Fields that ask for nothing this server has; other values than these are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "conversation": (),
    "max_tool_calls": (),
    "prompt": (),
    "context_management": ([],),
    "background_options": ({},),
    "moderation": (),
    "image": (),
    "access_programs": (),
}
# Accepted whatever they say, since they do not change an answer.
NO_EFFECT = ("service_tier", "stream_options", "prompt_cache_retention", "prompt_cache_options", "client_metadata")
# Of `include`: what is in every answer, or asks for what would be empty here.
INCLUDES = ("message.output_text.logprobs", "message.input_image.image_url", "reasoning.encrypted_content")
LOGPROBS = INCLUDES[0]

T = TypeVar("T")


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON by a schema, which is enforced, strict or not."""

    schema: dict[str, Any] | bool
    name: str
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True):
    """Form of the answer's text."""

    format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # nobody here makes answers shorter or longer

    def check_supported(self) -> None:
        """Refuse what would be ignored.

        Raises:
            RequestError: 400, it asks for another length than the model's own.
        """
        if self.verbosity not in (None, "medium"):
            raise unsupported("text.verbosity")


Summary = Literal["auto", "concise", "detailed", "none"]


class Reasoning(msgspec.Struct, frozen=True):
    """Switch of thinking, and how it is shown.

    Nobody summarises here: where a summary is asked for, the thinking itself is sent in its place.
    """

    effort: str | None = None
    mode: str | None = None  # there is none but the standard one
    context: Literal["auto", "current_turn", "all_turns"] | None = None  # the last is not what templates show
    summary: Summary | None = None
    generate_summary: Summary | None = None  # the older name

    @property
    def asked_summary(self) -> str | None:
        """The kind of summary that is asked for."""
        asked = self.summary or self.generate_summary
        return None if asked == "none" else asked

    def check_supported(self) -> None:
        """Refuse what would be ignored.

        Raises:
            RequestError: 400, it asks for another way to think, or for the thinking of earlier turns.
        """
        if self.mode not in (None, "standard"):
            raise unsupported("reasoning.mode")
        if self.context == "all_turns":
            raise unsupported("reasoning.context")


Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=MAX_METADATA_KEY)], Annotated[str, Meta(max_length=MAX_METADATA_VALUE)]],
    Meta(max_length=MAX_METADATA),
]


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/responses: the fields of OpenAI's that do something here."""

    input: str | Annotated[list[dict[str, Any]], Meta(max_length=MAX_ITEMS)] = ""  # a question, or items
    model: Annotated[str, Meta(max_length=MAX_CHARS)] | None = None
    instructions: str | None = None  # a system message for this answer alone
    previous_response_id: str | None = None  # whose input and output come before `input`
    store: bool | None = None  # keep the answer; true if left out
    background: bool | None = None  # answer at once, and go on without a connection
    stream: bool | None = None
    max_output_tokens: Positive | None = None  # reasoning included
    temperature: Wide | None = None
    top_p: Fraction | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None  # needs `include`
    include: Annotated[list[str], Meta(max_length=MAX_INCLUDES)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None  # functions, namespaces
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None  # a conversation that is too long is refused, not cut
    metadata: Metadata | None = None  # repeated in the answer
    user: str | None = None  # repeated in the answer, as are the next two
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class NamespaceTool(msgspec.Struct, frozen=True):
    """Functions under a name in common."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)]
    description: Annotated[str, Meta(max_length=1024)] | None = None  # the model reads it with each function


# ------------------------------------------------------------------------------------------------------ input items


class InputText(msgspec.Struct, frozen=True, tag_field="type", tag="input_text"):
    text: str


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    text: str


class SummaryText(msgspec.Struct, frozen=True, tag_field="type", tag="summary_text"):
    text: str


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    text: str


class RefusalText(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    refusal: str


class InputImage(PixelRange, frozen=True, tag_field="type", tag="input_image"):
    """An image. What it is to be brought to is an extension, here and in the next two, as the chat API has it."""

    image_url: str | None = None
    file_id: str | None = None


class InputFile(Sampling, frozen=True, tag_field="type", tag="input_file"):
    """An image or a video as a file."""

    file_data: str | None = None
    file_url: str | None = None
    file_id: str | None = None
    filename: str | None = None


class InputVideo(Sampling, frozen=True, tag_field="type", tag="input_video"):
    """An extension: a video, with the sampling of its frames beside its link or in the object with it."""

    video_url: str | VideoURL


Part = InputText | OutputText | RefusalText | InputImage | InputFile | InputVideo
Content = str | list[Part]


class MessageItem(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(msgspec.Struct, frozen=True):
    name: str
    call_id: str
    arguments: str
    namespace: str | None = None


class CallOutputItem(msgspec.Struct, frozen=True):
    call_id: str
    output: Content


class ReasoningItem(msgspec.Struct, frozen=True):
    summary: list[SummaryText] = []
    content: list[ReasoningText] | None = None


ITEMS: dict[str, type[msgspec.Struct]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}


# --------------------------------------------------------------------------------------------------------- decoding

_chat_types = {field.name: field.type for field in msgspec.structs.fields(ChatRequest)}
_extended = [(name, _chat_types[name], None) for name in EXTENSIONS]
_Body = msgspec.defstruct(
    "_Body",
    [*_extended, *((name, Any, None) for name in (*NEUTRAL, *NO_EFFECT))],
    bases=(ResponsesRequest,),
    frozen=True,
    kw_only=True,
)
_decoder = msgspec.json.Decoder(cast(type[ResponsesRequest], _Body), strict=False)
KNOWN = frozenset(field.name for field in msgspec.structs.fields(_Body))


def decode_body(body: bytes) -> ResponsesRequest:
    """Decode a request; the extensions are attributes beyond those of `ResponsesRequest`.

    Raises:
        RequestError: 400 naming the field.
    """
    request = decode_json(_decoder, body)
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            raise unsupported(name)
    for options in (request.reasoning, request.text):
        if options is not None:
            options.check_supported()
    if request.truncation == "auto":
        raise unsupported("truncation")
    return request


def extensions(request: ResponsesRequest) -> dict[str, Any]:
    """Return the fields of the chat API that a decoded request has, too."""
    values = {name: getattr(request, name) for name in EXTENSIONS}
    return {name: value for name, value in values.items() if value is not None}


def convert(value: Any, kind: type[T], path: str) -> T:
    """Return JSON as a value of a type.

    Raises:
        RequestError: 400 naming the field below `path`.
    """
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise explained(str(error), path) from None


def unsupported(path: str) -> RequestError:
    """Return a 400: a field that is known asks for something that this server does not do."""
    return invalid(f"`{path}` is not supported by this server.", path, "unsupported_parameter")
