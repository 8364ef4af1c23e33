"""JSON schema of a chat request: types and plain ranges. Rules that span several fields are in validate.py."""

import hashlib
import re
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from services.gateway.request.model_names import MAX_CHARS
from services.gateway.request.unsupported import NEUTRAL_VALUES
from shared.errors import RequestError, invalid

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_BIASES = 1024
MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_GUIDED_CHOICES = 4096

Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0)]
Frames = Annotated[int, Meta(ge=-1, le=100_000)]  # -1: no bound, as in the reference server
Positive = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ImageURL(msgspec.Struct, frozen=True):
    url: str


class ImagePart(msgspec.Struct, frozen=True, tag_field="type", tag="image_url"):
    image_url: str | ImageURL


class VideoURL(msgspec.Struct, frozen=True):
    """A video and the sampling of its frames; a value left out is the server's."""

    url: str
    fps: Annotated[float, Meta(ge=-1, le=1000)] | None = None
    min_frames: Frames | None = None
    max_frames: Frames | None = None
    target_frames: Frames | None = None
    frames_sample: Literal["leading", "middle", "rand"] | None = None
    subtitles: Any = None  # known, and refused by validate.py


class VideoPart(msgspec.Struct, frozen=True, tag_field="type", tag="video_url"):
    video_url: str | VideoURL


class FileData(msgspec.Struct, frozen=True):
    """An image or a video as a file input of LiteLLM or OpenAI: a data URL, or a link and its media type."""

    file_data: str | None = None
    file_id: str | None = None
    format: str | None = None


class FilePart(msgspec.Struct, frozen=True, tag_field="type", tag="file"):
    file: FileData


Part = TextPart | ImagePart | VideoPart | FilePart


class FunctionCall(msgspec.Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct, frozen=True):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True):
    """One turn of the conversation. validate.py checks which fields its role may have."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | dict[str, Any] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Function(msgspec.Struct, frozen=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: Function


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Any text: the default."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, frozen=True):
    """A JSON schema as OpenAI names it. `strict` may be false: the schema is enforced all the same."""

    schema: dict[str, Any] | bool
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class StructuralTagFormat(msgspec.Struct, frozen=True, tag_field="type", tag="structural_tag"):
    """Text with parts that follow a grammar; `shared/grammar/structural_tag.py` has both forms."""

    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat
Choices = Annotated[list[str], Meta(min_length=1, max_length=MAX_GUIDED_CHOICES)]


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The grammar of an answer as vLLM states it; one of the first six."""

    json: str | dict[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    whitespace_pattern: str | None = None  # between the tokens of JSON, as a regular expression
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    disable_fallback: bool = False  # there is one backend


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions. Fields that no API defines are ignored."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: Annotated[str, Meta(max_length=MAX_CHARS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None

    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    reasoning_max_tokens: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    stop: (
        Annotated[str, Meta(max_length=MAX_STOP_CHARS)]
        | Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]],
            Meta(max_length=MAX_STOPS),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    bad_words: (
        Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]], Meta(max_length=MAX_BAD_WORDS)
        ]
        | None
    ) = None
    bad_words_token_ids: (
        Annotated[
            list[TokenId | Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]],
            Meta(max_length=MAX_BAD_WORDS),
        ]
        | None
    ) = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_token_ids: bool | None = None

    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None

    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


# Known but unsupported fields are decoded too, for validate.py to refuse; fields that no API defines are skipped.
_Body = msgspec.defstruct(
    "_Body", [(name, Any, None) for name in NEUTRAL_VALUES], bases=(ChatRequest,), frozen=True, kw_only=True
)
_body = msgspec.json.Decoder(cast(type[ChatRequest], _Body))
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ERROR = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>\w+)`$")
# Fields that say how the answer is sent, not what it is.
_TRANSPORT_FIELDS = frozenset({"stream", "stream_options"})


def decode_body(body: bytes) -> ChatRequest:
    """Decode a request, its known but unsupported fields included (as attributes beyond those of `ChatRequest`).

    Raises:
        RequestError: 400; `param` is the path of the offending value.
    """
    try:
        return _body.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"The request body is not valid JSON: {error}", None, "invalid_json") from None
    except RecursionError:
        raise invalid("The request body is nested too deeply.", None, "invalid_json") from None


def digest_body(body: bytes) -> str:
    """Return a digest of what a body (JSON, an object) asks for, whatever the order of its fields and `stream`.

    It is computed from the fields' bytes, of which no value is decoded, so it is the same in gateways of all versions,
    whichever fields they know.
    """
    fields = _raw_fields.decode(body)
    digest = hashlib.sha256()
    for name in sorted(fields.keys() - _TRANSPORT_FIELDS):
        key, value = name.encode(), memoryview(fields[name])
        digest.update(b"%d %d %b" % (len(key), len(value), key))
        digest.update(value)
    return digest.hexdigest()


def _explain(text: str) -> RequestError:
    """Translate msgspec's "what - at `$.path`" into OpenAI's terms."""
    parts = _ERROR.match(text)
    assert parts is not None
    what, path = parts["what"], (parts["path"] or "").removeprefix(".")
    missing = _MISSING.match(what)
    if missing:
        path = f"{path}.{missing['field']}".removeprefix(".")
        return invalid(f"Missing required field `{path}`.", path, "missing_required_parameter")
    if not path:
        return invalid(f"The request body: {what}.", None)
    return invalid(f"`{path}`: {what}.", path)
