"""Every field that some API knows of an image or a video, beside every form of one: it is used, or refused by name."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from whole_parser import CHAT, WholeParser

from services.gateway.dialects.dialect import Dialect
from services.gateway.dialects.messages.dialect import MessagesDialect
from services.gateway.dialects.responses.responses import ResponsesDialect
from services.gateway.request.conversation import MediaFields, Sampling
from services.gateway.request.media import MediaItem
from services.gateway.request.media_options import LOW_DETAIL_PIXELS
from services.gateway.request.schemas import ChatRequest
from services.gateway.request.statement import Statement
from services.gateway.request.tokens import decode_tokenize
from shared.errors import RequestError
from shared.messages import VideoOptions
from shared.model.generation import GenerationDefaults

MESSAGES = MessagesDialect()
RESPONSES = ResponsesDialect(GenerationDefaults(0.8, 0.7, 5, 1.1, 0.2, 0.3, 0.05), 100.0, 1 << 20)
PIXELS = {"image": b"\x89PNG\r\nrest", "video": b"\0\0\0\x1cftypisom"}
TYPES = {"image": "image/png", "video": "video/mp4"}
BASE64 = {kind: base64.b64encode(data).decode() for kind, data in PIXELS.items()}
URLS = {kind: f"data:{TYPES[kind]};base64,{data}" for kind, data in BASE64.items()}

# A value of each field that asks for something, and what an image or a video is then brought to; none: it is refused.
SAMPLING: dict[str, Any] = {"fps": 1.5, "min_frames": 3, "max_frames": 9, "target_frames": 4, "frames_sample": "middle"}
SIZES: dict[str, Any] = {"min_pixels": 4000, "max_pixels": 9000, "detail": "low"}
REFUSED: dict[str, Any] = {
    **{"resized_height": 28, "resized_width": 28, "total_pixels": 10_000, "nframes": 4, "video_start": 1.5},
    **{"video_end": 2, "sample_fps": 2, "raw_fps": 25, "enable_rotate": True, "subtitles": "a"},
    **{"min_dynamic_patch": 1, "max_dynamic_patch": 12, "image_pixel_limit": {"max_pixels": 9000}},
}
FIELDS = {**SAMPLING, **SIZES, **REFUSED}


class Form:
    """One way to write an image or a video: its part, its path in the body, and the field with the link."""

    def __init__(
        self, dialect: Dialect, kind: str, part: dict[str, Any], link: str | None = None, *, tool: bool = False
    ) -> None:
        """`link`: the field whose object may state fields, too."""
        self.dialect, self.kind, self.part, self.link, self.tool = dialect, kind, part, link, tool
        self.path = {
            ("chat", False): "messages[0].content[0]",
            ("chat", True): "messages[0].content[0]",
            ("responses", False): "input[0].content[0]",
            ("responses", True): "input[1].output[0]",
            ("messages", False): "messages[0].content[0]",
            ("messages", True): "messages[1].content[0].content[0]",
        }[dialect.name or "chat", tool]

    def __str__(self) -> str:
        place = "tool-" if self.tool else ""
        return f"{self.dialect.name or 'chat'}-{place}{self.part['type']}-{self.kind}-{self.link or 'flat'}"

    def body(self, part: dict[str, Any]) -> dict[str, Any]:
        """A body with this part."""
        text = "What is it?"
        if self.dialect is CHAT:
            role = {"role": "tool", "tool_call_id": "c"} if self.tool else {"role": "user"}
            return {"messages": [{**role, "content": [part, {"type": "text", "text": text}]}]}
        if self.dialect is RESPONSES and self.tool:
            call = {"type": "function_call", "name": "f", "call_id": "c", "arguments": "{}"}
            return {"input": [call, {"type": "function_call_output", "call_id": "c", "output": [part]}]}
        if self.dialect is RESPONSES:
            return {"input": [{"role": "user", "content": [part, {"type": "input_text", "text": text}]}]}
        if self.tool:
            use = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
            turns = [{"role": "assistant", "content": [use]}]
            shown = {"type": "tool_result", "tool_use_id": "c", "content": [part]}
            return {"max_tokens": 8, "messages": [*turns, {"role": "user", "content": [shown]}]}
        return {"max_tokens": 8, "messages": [{"role": "user", "content": [part, {"type": "text", "text": text}]}]}


def forms() -> Iterator[Form]:
    """All ways to write an image or a video."""
    for kind, url in URLS.items():
        for name in (f"{kind}_url", f"input_{kind}"):
            for tool in (False, True):
                yield Form(CHAT, kind, {"type": name, f"{kind}_url": url}, tool=tool)
                yield Form(CHAT, kind, {"type": name, f"{kind}_url": {"url": url}}, f"{kind}_url", tool=tool)
        yield Form(CHAT, kind, {"type": kind, kind: url})
        yield Form(CHAT, kind, {"type": kind, kind: {"url": url}}, kind)
        yield Form(CHAT, kind, {"type": "file", "file": {"file_data": url}}, "file")
        yield Form(CHAT, kind, {"type": "file", "file": {"file_data": BASE64[kind]}}, "file")
        for tool in (False, True):
            yield Form(RESPONSES, kind, {"type": f"input_{kind}", f"{kind}_url": url}, tool=tool)
            yield Form(RESPONSES, kind, {"type": "input_file", "file_data": url}, tool=tool)
            source = {"type": "base64", "media_type": TYPES[kind], "data": BASE64[kind]}
            yield Form(MESSAGES, kind, {"type": kind, "source": source}, "source", tool=tool)
    yield Form(RESPONSES, "video", {"type": "input_video", "video_url": {"url": URLS["video"]}}, "video_url")
    link = {"type": "url", "url": "https://example.org/a.png"}
    yield Form(MESSAGES, "image", {"type": "image", "source": link}, "source")


FORMS = list(forms())


def medium(parser: WholeParser, form: Form, part: dict[str, Any]) -> MediaItem:
    item: MediaItem
    [item] = parser.parse(json.dumps(form.body(part)).encode(), form.dialect).media
    assert item.kind == form.kind
    return item


def stated(item: MediaItem) -> dict[str, Any]:
    """What an image or a video is brought to, where it is not the server's."""
    video = {name: getattr(item.video, name) for name in VideoOptions.__struct_fields__}
    pixels = {name: getattr(item, name) for name in ("min_pixels", "max_pixels", "wished_max_pixels")}
    values = {**video, **pixels}
    return {name: value for name, value in values.items() if value is not None}


def test_the_table_has_every_field() -> None:
    assert set(MediaFields.__struct_fields__) <= set(Sampling.__struct_fields__) == set(FIELDS)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_field_is_used_or_refused_by_name(parser: WholeParser, form: Form) -> None:
    assert stated(medium(parser, form, form.part)) == {}
    for name, value in FIELDS.items():
        parts = {f"{form.path}.{name}": {**form.part, name: value}}
        if form.link is not None:
            holder = {**form.part[form.link], name: value}
            parts[f"{form.path}.{form.link}.{name}"] = {**form.part, form.link: holder}
        for path, part in parts.items():
            if name in REFUSED or (name in SAMPLING and form.kind == "image"):
                with pytest.raises(RequestError) as refused:
                    medium(parser, form, part)
                assert (refused.value.failure.code, refused.value.failure.param) == ("unsupported_parameter", path)
            else:
                used = {"wished_max_pixels": LOW_DETAIL_PIXELS} if name == "detail" else {name: value}
                assert stated(medium(parser, form, part)) == used, path


@pytest.mark.parametrize("form", [form for form in FORMS if form.dialect is CHAT], ids=str)
def test_they_are_refused_where_tokens_are_counted(parser: WholeParser, form: Form) -> None:
    asked = decode_tokenize(json.dumps(form.body({**form.part, "nframes": 4})).encode())
    assert isinstance(asked, ChatRequest)
    with pytest.raises(RequestError) as refused:
        parser.read(Statement(asked))
    assert refused.value.failure.param == f"{form.path}.nframes"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_null_and_the_least_of_a_field_ask_for_nothing(parser: WholeParser, form: Form) -> None:
    nothing = dict.fromkeys(FIELDS)
    assert stated(medium(parser, form, {**form.part, **nothing, "detail": "auto", "nframes": 0, "subtitles": ""})) == {}
    if form.link is not None:
        assert stated(medium(parser, form, {**form.part, form.link: {**form.part[form.link], **nothing}})) == {}


@pytest.mark.parametrize(
    ("own", "sizes", "pixels"),
    [
        ({"detail": "low"}, {"image_max_pixels": 9000}, (9000, LOW_DETAIL_PIXELS)),
        ({"detail": "low"}, {}, (None, LOW_DETAIL_PIXELS)),
        ({"detail": "low", "max_pixels": 400_000}, {}, (400_000, None)),
        ({"detail": "high"}, {"image_max_pixels": 900_000}, (900_000, None)),
        ({"detail": "original"}, {}, (None, None)),
    ],
)
def test_low_detail_is_a_wish_beside_the_bounds_of_the_request(
    parser: WholeParser, own: dict[str, Any], sizes: dict[str, Any], pixels: tuple[int | None, int | None]
) -> None:
    part = {"type": "image_url", "image_url": {"url": URLS["image"], **own}}
    body = {"messages": [{"role": "user", "content": [part]}], "mm_processor_kwargs": sizes}
    [item] = parser.parse(json.dumps(body).encode()).media
    assert (item.max_pixels, item.wished_max_pixels) == pixels
