"""Images and videos as the clients of other servers state them, and what they ask of them beside the link."""

import base64
import json
from typing import Any

import pytest
from whole_parser import WholeParser

from services.gateway.request.media import MediaItem
from shared.errors import RequestError
from shared.messages import VideoOptions

PNG = b"\x89PNG\r\nrest"
MP4 = b"\0\0\0\x1cftypisom"
IMAGE = "data:image/png;base64," + base64.b64encode(PNG).decode()
VIDEO = "data:video/mp4;base64," + base64.b64encode(MP4).decode()


def media(parser: WholeParser, part: dict[str, Any], **fields: Any) -> MediaItem:
    body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}], **fields}
    [item] = parser.parse(json.dumps(body).encode()).media
    return item


def refused_field(parser: WholeParser, part: dict[str, Any]) -> str | None:
    with pytest.raises(RequestError) as refused:
        media(parser, part)
    assert refused.value.failure.code == "unsupported_parameter"
    return refused.value.failure.param


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "image", "image": IMAGE}, "image"),
        ({"type": "image", "image": {"url": IMAGE}}, "image"),
        ({"type": "input_image", "image_url": IMAGE, "detail": "auto"}, "image_url"),
        ({"type": "image_url", "image_url": {"url": IMAGE, "format": "image/png"}, "uuid": "1"}, "image_url"),
        ({"type": "file", "file": {"file_data": IMAGE.partition(",")[2], "filename": "a.png"}}, "file"),
    ],
)
def test_an_image(parser: WholeParser, part: dict[str, Any], field: str) -> None:
    item = media(parser, part)
    assert (item.kind, item.data, item.param) == ("image", PNG, f"messages[0].content[0].{field}")


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "video", "video": VIDEO}, "video"),
        ({"type": "video", "video": {"url": VIDEO}}, "video"),
        ({"type": "input_video", "video_url": VIDEO}, "video_url"),
        ({"type": "file", "file": {"file_data": VIDEO.partition(",")[2], "filename": "a.mp4"}}, "file"),
    ],
)
def test_a_video(parser: WholeParser, part: dict[str, Any], field: str) -> None:
    item = media(parser, part)
    assert (item.kind, item.data, item.param) == ("video", MP4, f"messages[0].content[0].{field}")


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("image", b"II+\0\x08\0\0\0" + bytes(8)),  # BigTIFF, of either order of bytes
        ("image", b"MM\0+\0\x08\0\0" + bytes(8)),
        ("video", 2 * (b"\x47\x40" + bytes(186))),
        ("video", 2 * (bytes(4) + b"\x47\x40" + bytes(186))),  # .mts of a camera: four bytes of time before each packet
    ],
)
def test_a_file_of_no_type_is_what_its_bytes_say(parser: WholeParser, kind: str, data: bytes) -> None:
    item = media(parser, {"type": "file", "file": {"file_data": base64.b64encode(data).decode()}})
    assert (item.kind, item.data) == (kind, data)


OPTIONS = {"fps": 1, "min_frames": 2, "max_frames": 9, "frames_sample": "middle"}
SAMPLED = VideoOptions(fps=1, min_frames=2, max_frames=9, frames_sample="middle")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": VIDEO, **OPTIONS, "min_pixels": 4000, "max_pixels": 9000}},
        {"type": "video_url", "video_url": {"url": VIDEO}, **OPTIONS, "min_pixels": 4000, "max_pixels": 9000},
        {"type": "video_url", "video_url": VIDEO, **OPTIONS, "min_pixels": 4000, "max_pixels": 9000},
        {"type": "video", "video": VIDEO, **OPTIONS, "min_pixels": 4000, "max_pixels": 9000},
        {"type": "video", "video": {"url": VIDEO, **OPTIONS, "max_pixels": 9000}, "fps": 7, "min_pixels": 4000},
        {"type": "file", "file": {"file_data": VIDEO, **OPTIONS, "max_pixels": 9000}, "fps": 7, "min_pixels": 4000},
    ],
)
def test_options_beside_a_link_are_those_with_it_which_win(parser: WholeParser, part: dict[str, Any]) -> None:
    item = media(parser, part)
    assert (item.video, item.min_pixels, item.max_pixels) == (SAMPLED, 4000, 9000)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": IMAGE}, "max_pixels": 9000},
        {"type": "image_url", "image_url": {"url": IMAGE, "max_pixels": 9000}},
        {"type": "image", "image": IMAGE, "max_pixels": 9000},
        {"type": "file", "file": {"file_data": IMAGE}, "max_pixels": 9000},
        {"type": "file", "file": {"file_data": IMAGE.partition(",")[2], "max_pixels": 9000}},
    ],
)
def test_a_parts_own_sizes_win_over_the_requests(parser: WholeParser, part: dict[str, Any]) -> None:
    sizes = {"image_min_pixels": 4000, "image_max_pixels": 8000}
    item = media(parser, part, mm_processor_kwargs=sizes)
    assert (item.min_pixels, item.max_pixels, item.video) == (4000, 9000, VideoOptions())


@pytest.mark.parametrize("name", ["total_pixels", "nframes", "video_start", "video_end", "resized_height", "subtitles"])
def test_what_cannot_be_done_with_a_video_is_refused_by_name(parser: WholeParser, name: str) -> None:
    beside = {"type": "video", "video": VIDEO, name: 8}
    assert refused_field(parser, beside) == f"messages[0].content[0].{name}"
    within = {"type": "video_url", "video_url": {"url": VIDEO, name: 8}}
    assert refused_field(parser, within) == f"messages[0].content[0].video_url.{name}"
    beside = {"type": "file", "file": {"file_data": VIDEO}, name: 8}
    assert refused_field(parser, beside) == f"messages[0].content[0].{name}"
    within = {"type": "file", "file": {"file_data": VIDEO, name: 8}}
    assert refused_field(parser, within) == f"messages[0].content[0].file.{name}"


def test_a_list_of_frames_is_refused_for_what_it_is(parser: WholeParser) -> None:
    assert refused_field(parser, {"type": "video", "video": [IMAGE, IMAGE]}) == "messages[0].content[0].video"
    frame = IMAGE.partition(",")[2]
    frames = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frame},{frame}"}}
    assert refused_field(parser, frames) == "messages[0].content[0].video_url"


def test_strings_among_parts_are_text(parser: WholeParser) -> None:
    def asked(content: Any) -> Any:
        return parser.parse(json.dumps({"messages": [{"role": "user", "content": content}]}).encode()).segments

    assert asked(["What is ", {"type": "text", "text": "it?"}]) == asked("What is it?")
