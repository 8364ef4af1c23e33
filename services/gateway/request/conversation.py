"""JSON schema of a conversation: messages with their parts and calls, and the tools that are offered.

What a model once said is never refused: arguments may be no JSON, calls may lack an id, content may be empty.
"""

from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}\Z")]  # as long as Anthropic's may be
Pixels = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Frames = Annotated[int, Meta(ge=-1, le=100_000)]  # -1: no bound, as in the reference server


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class InputTextPart(TextPart, frozen=True, tag_field="type", tag="input_text"):
    """The same, as OpenAI's Responses API writes it."""


class OutputTextPart(TextPart, frozen=True, tag_field="type", tag="output_text"):
    """The same, of an assistant."""


class RefusalPart(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ThinkingPart(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    """Reasoning among the content, as Anthropic and Mistral write it."""

    thinking: Any = None


class MediaFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that some API knows beside an image or a video, or in the object with its link.

    Where a class below gives one a type it works; where it is `Any` it is refused, by media.py.
    """

    fps: Any = None
    min_frames: Any = None
    max_frames: Any = None
    target_frames: Any = None
    frames_sample: Any = None
    resized_height: Any = None  # from here on: of Qwen's clients
    resized_width: Any = None
    total_pixels: Any = None
    nframes: Any = None
    video_start: Any = None
    video_end: Any = None
    sample_fps: Any = None
    raw_fps: Any = None
    enable_rotate: Any = None
    subtitles: Any = None  # FastDeploy
    min_dynamic_patch: Any = None  # SGLang, LMDeploy
    max_dynamic_patch: Any = None
    image_pixel_limit: Any = None  # Volcengine


class PixelRange(MediaFields, frozen=True, kw_only=True):
    """Sizes that one image, or each frame of one video, is brought to: within the server's, before the request's."""

    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None  # low: 512 x 512, if other bounds allow


class ImageURL(PixelRange, frozen=True):
    url: str


class ImagePart(PixelRange, frozen=True, tag_field="type", tag="image_url"):
    image_url: str | ImageURL


class InputImagePart(ImagePart, frozen=True, tag_field="type", tag="input_image"):
    """The same, as OpenAI's Responses API writes it."""


class BareImagePart(PixelRange, frozen=True, tag_field="type", tag="image"):
    """The same, as Qwen's and Hugging Face's clients write it."""

    image: str | ImageURL


class Sampling(PixelRange, frozen=True, kw_only=True):
    """The sampling of a video's frames; a value left out is the request's, or the server's."""

    fps: Annotated[float, Meta(ge=-1, le=1000)] | None = None
    min_frames: Frames | None = None
    max_frames: Frames | None = None
    target_frames: Frames | None = None
    frames_sample: Literal["leading", "middle", "rand"] | None = None


class VideoURL(Sampling, frozen=True):
    url: str


class VideoPart(Sampling, frozen=True, tag_field="type", tag="video_url"):
    video_url: str | VideoURL


class InputVideoPart(VideoPart, frozen=True, tag_field="type", tag="input_video"):
    """The same, as our Responses API writes it."""


class BareVideoPart(Sampling, frozen=True, tag_field="type", tag="video"):
    """The same, as Qwen's clients write it. A list of frames in place of a video is refused by media.py."""

    video: str | VideoURL | list[str]


class FileData(Sampling, frozen=True):
    """An image or a video as a file input of LiteLLM or OpenAI: base64, a data URL, or a link and its media type.

    Which of both is known when it is read, so media.py refuses the sampling of an image.
    """

    file_data: str | None = None
    file_id: str | None = None
    format: str | None = None


class FilePart(Sampling, frozen=True, tag_field="type", tag="file"):
    file: FileData


ShownImagePart = ImagePart | InputImagePart | BareImagePart
ShownVideoPart = VideoPart | InputVideoPart | BareVideoPart
MediaPart = ShownImagePart | ShownVideoPart | FilePart
WrittenPart = TextPart | InputTextPart | OutputTextPart | RefusalPart
Part = MediaPart | WrittenPart | ThinkingPart


class FunctionCall(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: Any = None  # JSON text, or what the model wrote in its place, or the value itself


class CustomCall(msgspec.Struct, frozen=True):
    name: str | None = None
    input: Any = None


class ToolCall(msgspec.Struct, frozen=True):
    function: FunctionCall | None = None
    custom: CustomCall | None = None
    id: str | None = None
    type: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One turn of the conversation. validate.py checks which fields its role may have."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part | str] | dict[str, Any] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None  # the older form of `tool_calls`
    tool_call_id: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: str | None = None
    prefix: bool | None = None  # of the last one: as `continue_final_message`, as DeepSeek's and Mistral's clients ask
    partial: bool | None = None  # the same, of Qwen's and Moonshot's
    tools: Any = None  # SGLang: refused


class Function(msgspec.Struct, frozen=True):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None  # refused here and beside it


class Tool(msgspec.Struct, frozen=True):
    """A function. Some clients write it without `function` around it: as the Responses API has it, or Anthropic's."""

    function: Function = cast(Function, None)  # never None once it is made
    type: Literal["function"] | None = None
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None  # OpenAI, vLLM, SGLang

    def __post_init__(self) -> None:
        """Bring the short forms into the long one."""
        if self.function is not None:
            return
        if self.name is None:
            raise ValueError("Object missing required field `function`")
        schema = self.input_schema if self.parameters is None else self.parameters
        force_setattr(self, "function", Function(self.name, self.description, schema, self.strict))


def stated_medium(part: MediaPart) -> tuple[str, str | ImageURL | VideoURL | FileData | list[str]]:
    """Return the field of a part that has its image or video, and what it has there."""
    match part:
        case FilePart(file=given):
            return "file", given
        case BareImagePart(image=given):
            return "image", given
        case BareVideoPart(video=given):
            return "video", given
        case ImagePart(image_url=given):
            return "image_url", given
    return "video_url", part.video_url


def stated_fields(holder: MediaFields) -> dict[str, Any]:
    """Return what is stated beside a medium, or in the object with its link, in fields that some API knows."""
    values = ((name, getattr(holder, name, None)) for name in Sampling.__struct_fields__)
    return {name: value for name, value in values if value is not None}


def part_text(part: WrittenPart | str) -> str:
    """Return the text of a part, which some clients write as the text alone."""
    return part if isinstance(part, str) else part.text


def text_of(value: Any, levels: int = 4) -> str:
    """Return the text in a value that should be text, and with some clients is a part or a list of parts.

    Nothing that is nested in more than `levels` lists and objects is looked at.
    """
    if isinstance(value, str):
        return value
    if not levels:
        return ""
    if isinstance(value, list):
        return "".join(text_of(one, levels - 1) for one in value)
    if isinstance(value, dict):
        texts = (text_of(value.get(key), levels - 1) for key in ("text", "thinking", "content", "summary"))
        return next(filter(None, texts), "")
    return ""


def reasoning_of(message: Message) -> str:
    """Return the reasoning of an assistant's message, in whichever field or part the client keeps it."""
    parts = message.content if isinstance(message.content, list) else ()
    blocks = [part.thinking for part in parts if isinstance(part, ThinkingPart)]
    return text_of(message.reasoning_content) or text_of(message.reasoning) or text_of(blocks)
