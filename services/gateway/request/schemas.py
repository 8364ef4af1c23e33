"""JSON schema of a chat request: types and plain ranges. Rules that span several fields are in validate.py."""

import hashlib
import re
from collections.abc import Set
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from services.gateway.request.conversation import Frames, Message, Tool
from services.gateway.request.model_names import MAX_CHARS
from services.gateway.request.surrogates import replace_lone_surrogates
from services.gateway.request.unsupported import NEUTRAL_VALUES, NO_EFFECT, UNSUPPORTED_TYPES
from shared.errors import RequestError, invalid

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_BIASES = 1024
MAX_ALLOWED_IDS = 8192
MAX_LOOP_REPEATS = 1000
MAX_LOOP_TOKENS = 1024
MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_GUIDED_CHOICES = 4096

Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Budget = Annotated[int, Meta(ge=-1, le=MAX_TOKENS)]  # -1: no limit
Wide = Annotated[float, Meta(ge=0, le=1e6)]  # any number that is finite

T = TypeVar("T")


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Any text: the default."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """Any JSON object, or one by a schema, as llama.cpp's clients ask for it."""

    schema: dict[str, Any] | None = None


class NamedSchema(msgspec.Struct, frozen=True):
    """A JSON schema as OpenAI names it. `strict` may be false: the schema is enforced all the same."""

    schema: dict[str, Any] | bool
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON by a schema, which llama.cpp's clients may state without a name."""

    json_schema: NamedSchema = cast(NamedSchema, None)  # never None once it is made
    schema: dict[str, Any] | bool | None = None

    def __post_init__(self) -> None:
        """Bring the short form into the long one."""
        if self.json_schema is not None:
            return
        if self.schema is None:
            raise ValueError("Object missing required field `json_schema`")
        force_setattr(self, "json_schema", NamedSchema(self.schema))


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
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None  # there is one backend


class MediaKwargs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of a request's images and videos, as FastDeploy's server has them. A video's own options win."""

    image_min_pixels: Positive | None = None
    image_max_pixels: Positive | None = None
    video_min_pixels: Positive | None = None
    video_max_pixels: Positive | None = None
    video_fps: Annotated[float, Meta(ge=-1, le=1000)] | None = None
    video_min_frames: Frames | None = None
    video_max_frames: Frames | None = None
    video_target_frames: Frames | None = None
    video_frames_sample: Literal["leading", "middle", "rand"] | None = None


class Thinking(msgspec.Struct, frozen=True):
    """Switch and budget of thinking, as Anthropic's and others' clients send them."""

    type: Literal["enabled", "disabled", "adaptive", "auto"] | None = None
    budget_tokens: Budget | None = None


class Reasoning(msgspec.Struct, frozen=True):
    """The same, as OpenRouter's clients send it."""

    effort: str | None = None
    max_tokens: Budget | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of every request for generated text, whatever its prompt is stated as."""

    model: Annotated[str, Meta(max_length=MAX_CHARS)] | None = None  # a served name, or any where none is set
    stream: bool | None = None  # send the answer as events, as it is written
    stream_options: StreamOptions | None = None  # `include_usage`, `continuous_usage_stats`; needs `stream`
    n: Annotated[int, Meta(ge=1)] | None = None  # number of answers

    max_tokens: Budget | None = None  # the most tokens of an answer, reasoning included; -1: all that there is room for
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None  # nothing ends an answer before
    temperature: Wide | None = None  # 0: the most likely token
    top_p: Fraction | None = None  # sample from the most likely tokens that have this share together
    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | None = None  # from this many; 0 and -1: off
    min_p: Fraction | None = None  # from those at least this share as likely as the most likely one
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] | None = None  # on all tokens seen, the prompt's too
    presence_penalty: Penalty | None = None  # on tokens of the answer
    frequency_penalty: Penalty | None = None  # on tokens of the answer, times their number
    seed: Annotated[int, Meta(ge=-MAX_SEED, le=MAX_SEED)] | None = None  # -1: drawn, as where none is given
    # Strings that end the content; empty ones are left out.
    stop: (
        Annotated[str, Meta(max_length=MAX_STOP_CHARS)]
        | Annotated[list[Annotated[str, Meta(max_length=MAX_STOP_CHARS)]], Meta(max_length=MAX_STOPS)]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)] | None = None  # tokens that end the content
    include_stop_str_in_output: bool | None = None  # show the stop string that was found
    ignore_eos: bool | None = None  # go on behind the model's own end
    # Words that are never written.
    bad_words: (
        Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]], Meta(max_length=MAX_BAD_WORDS)
        ]
        | None
    ) = None
    # The same as tokens, or lists of tokens.
    bad_words_token_ids: (
        Annotated[
            list[TokenId | Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]],
            Meta(max_length=MAX_BAD_WORDS),
        ]
        | None
    ) = None
    # Added to the logits of tokens, by their ids.
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None = None
    # Tokens of which the content consists, its end too; the reasoning is free.
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_ALLOWED_IDS)] | None = None
    skip_special_tokens: bool | None = None  # false: special tokens inside the answer are shown by their names
    return_token_ids: bool | None = None  # see "Token ids" of api.md
    # How likely each token of the prompt was, and this many others in its place; not with `stream`. See api.md
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    response_format: ResponseFormat | None = None  # text, JSON, JSON by a schema, or a structural tag
    structured_outputs: StructuredOutputs | None = None  # the grammar of the content, as vLLM states it
    guided_json: str | dict[str, Any] | bool | None = None  # a JSON schema that the content follows
    guided_json_object: bool | None = None  # the content is a JSON object
    guided_regex: str | None = None  # a regular expression that the content matches as a whole
    guided_choice: Choices | None = None  # texts of which the content is one
    guided_grammar: str | None = None  # a grammar in Lark's notation or GBNF
    structural_tag: str | dict[str, Any] | None = None  # free text with parts that follow a grammar
    json_schema: str | dict[str, Any] | None = None  # as guided_json, for SGLang's clients
    regex: str | None = None  # as guided_regex, for SGLang's clients
    ebnf: str | None = None  # as guided_grammar, for SGLang's clients
    grammar: str | None = None  # as guided_grammar, for llama.cpp's clients

    # Prefixes are shared within a salt only.
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    extra_key: Annotated[str, Meta(max_length=256)] | None = None  # the same, as SGLang has it; of both, within both
    request_id: Annotated[str, Meta(pattern=r"^[\x21-\x7e]{1,128}\Z")] | None = None  # as the header X-Request-ID


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions: all fields that do something.

    The comments are what docs/request-fields.md says of them. NEUTRAL_VALUES has the fields that are refused.
    """

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]  # the conversation
    max_completion_tokens: Budget | None = None  # as max_tokens, and wins
    stop_in_reasoning: bool | None = None  # stop strings and stop tokens end the reasoning, too
    logprobs: bool | None = None  # say how likely each token was
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None  # and this many others in its place

    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None  # functions that the model may call
    tool_choice: str | dict[str, Any] | None = None  # auto, none, required, a tool by name, or allowed_tools
    tool_call_ends_reasoning: bool | None = None  # a call that begins in reasoning ends it; else the server's default
    parallel_tool_calls: bool | None = None  # false: one call at most

    enable_thinking: bool | None = None  # whether the model thinks first; it does by default
    thinking: Thinking | bool | None = None  # the same: `{"type": "disabled"}`, and `budget_tokens`
    reasoning: Reasoning | None = None  # the same: `effort`, `enabled`, `max_tokens`; `exclude` as include_reasoning
    reasoning_effort: str | None = None  # the same: `none` turns it off, every other effort on
    # Go on with the last message, an assistant's, as if it were being written: its reasoning, or its content.
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None  # false: the prompt does not begin the assistant's turn
    chat_template: str | None = None  # the template to use, where the server allows it (`trust_request_chat_template`)
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the template, `enable_thinking` too
    mm_processor_kwargs: MediaKwargs | None = None  # sizes of images and videos, within the server's bounds; see api.md
    metadata: dict[str, Any] | None = None  # kept by nobody; `enable_thinking` in it is the same
    reasoning_max_tokens: Budget | None = None  # the most tokens of thinking; -1: no limit
    thinking_token_budget: Budget | None = None  # the same, as vLLM has it; 0: no thinking
    thinking_budget: Budget | None = None  # the same, as Qwen has it; 0: no thinking
    # So many copies of the same tokens in a row, 48 tokens at least, close the thinking; 0: none do; else the server's
    # default.
    thinking_loop_repeats: Annotated[int, Meta(ge=0, le=MAX_LOOP_REPEATS)] | None = None
    thinking_loop_tokens: Annotated[int, Meta(ge=1, le=MAX_LOOP_TOKENS)] | None = None  # the longest such run of tokens
    force_nonempty_content: bool | None = None  # reasoning alone is sent as content, too; else the server's default
    include_reasoning: bool | None = None  # false: the reasoning is not sent
    separate_reasoning: bool | None = None  # false: it is sent as the beginning of the content, `</think>` included


# Known but unsupported fields are decoded too, for validate.py to refuse; fields that no API defines are skipped.
_Body = msgspec.defstruct(
    "_Body", [(name, Any, None) for name in NEUTRAL_VALUES], bases=(ChatRequest,), frozen=True, kw_only=True
)
# Not strict, as vLLM is not: 5.0 and "5" are an integer.
_body = msgspec.json.Decoder(cast(type[ChatRequest], _Body), strict=False)
CHAT_FIELDS = frozenset(ChatRequest.__struct_fields__) | NEUTRAL_VALUES.keys() | NO_EFFECT
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ERROR = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>\w+)`$")
_OTHER_TYPE = re.compile(r"^Invalid (?:enum )?value '(?P<type>.*)'$")
# Fields that say how the answer is sent, not what it is.
_TRANSPORT_FIELDS = frozenset({"stream", "stream_options"})


def decode_body(body: bytes) -> ChatRequest:
    """Decode a request, its known but unsupported fields included (as attributes beyond those of `ChatRequest`).

    Raises:
        RequestError: 400; `param` is the path of the offending value.
    """
    return decode_json(_body, body)


def decode_json(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Decode a body.

    Raises:
        RequestError: 400; `param` is the path of the offending value.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"The request body is not valid JSON: {error}", None, "invalid_json") from None
    except RecursionError:
        raise invalid("The request body is nested too deeply.", None, "invalid_json") from None


def unknown_fields(body: bytes, known: Set[str]) -> list[str]:
    """Return the fields of a body (JSON, an object) that are not `known`, and so ignored.

    Args:
        known: those that the request's API, or one like it, defines.

    Raises:
        RequestError: 400, the name of such a field is no UTF-8.
    """
    return sorted(decode_json(_raw_fields, body).keys() - known)


def digest_body(body: bytes) -> str:
    """Return a digest of what a body (JSON, an object) asks for, whatever the order of its fields and `stream`.

    It is computed from the fields' bytes, of which no value is decoded, so it is the same in gateways of all versions,
    whichever fields they know.
    """
    fields = _raw_fields.decode(replace_lone_surrogates(body))
    digest = hashlib.sha256()
    for name in sorted(fields.keys() - _TRANSPORT_FIELDS):
        key, value = name.encode(), memoryview(fields[name])
        digest.update(b"%d %d %b" % (len(key), len(value), key))
        digest.update(value)
    return digest.hexdigest()


def explained(text: str, prefix: str = "") -> RequestError:
    """Translate msgspec's "what - at `$.path`" of the field `prefix`, or of the body, into OpenAI's terms."""
    parts = _ERROR.match(text)
    assert parts is not None
    what, path = parts["what"], (prefix + (parts["path"] or "")).removeprefix(".")
    missing = _MISSING.match(what)
    if missing:
        path = f"{path}.{missing['field']}".removeprefix(".")
        return invalid(f"Missing required field `{path}`.", path, "missing_required_parameter")
    if not path:
        return invalid(f"The request body: {what}.", None)
    other = _OTHER_TYPE.match(what)
    if other and path.endswith(".type") and other["type"] in UNSUPPORTED_TYPES:
        text = f"`{path}`: the type '{other['type']}' is not supported by this server."
        return invalid(text, path, "unsupported_parameter")
    return invalid(f"`{path}`: {what}.", path)
