"""Images and videos of a request: kind, position in the conversation, and link or uploaded bytes."""

import base64
import binascii
import re
from collections.abc import Mapping

import msgspec

from services.gateway.request.conversation import FilePart, ImagePart, MediaPart, VideoPart, VideoURL
from services.gateway.request.schemas import ChatRequest
from shared.errors import invalid
from shared.messages import MediaKind, VideoOptions

MAX_URL_CHARS = 8192

_DATA = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)(?P<params>(?:;[\w.+-]+=[\w.+-]*)*);base64,", re.IGNORECASE)
# Excludes everything that URL parsers disagree on: backslashes, spaces, control characters.
_LINK = re.compile(r"https?://[^\s\\\x00-\x20\x7f]+", re.IGNORECASE)


class MediaItem(msgspec.Struct, frozen=True):
    """One image or video. Exactly one of `url` and `data` is set."""

    kind: MediaKind
    part: str  # path of the content part: messages[0].content[1]
    field: str  # the part's field that holds it
    url: str | None = None
    data: bytes | None = None
    video: VideoOptions = VideoOptions()

    @property
    def param(self) -> str:
        """The path of the request field that errors name."""
        return f"{self.part}.{self.field}"


class MediaRules(msgspec.Struct, frozen=True):
    """Limits on the media of one request."""

    limits: Mapping[MediaKind, int]
    max_bytes: int  # of one upload, decoded

    def extract(self, request: ChatRequest) -> list[MediaItem]:
        """Return all media of the conversation, in order.

        Raises:
            RequestError: 400 naming the part: too many, not a data URL, wrong media type, too large, another scheme.
        """
        parts = [
            (part, f"messages[{i}].content[{j}]")
            for i, message in enumerate(request.messages)
            if isinstance(message.content, list)
            for j, part in enumerate(message.content)
            if isinstance(part, MediaPart)
        ]
        items = [self._read_part(part, path) for part, path in parts]
        for kind, limit in self.limits.items():
            found = [item for item in items if item.kind == kind]
            if len(found) > limit:
                where = found[limit].param
                text = f"`{where}`: too many {kind} items in prompt, got {len(found)} but limit is {limit}."
                raise invalid(text, where)
        return items

    def _read_part(self, part: ImagePart | VideoPart | FilePart, path: str) -> MediaItem:
        if isinstance(part, FilePart):
            return self._read_file(part, path)
        if isinstance(part, ImagePart):
            url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            return self._with_source(MediaItem("image", path, "image_url"), url)
        video = part.video_url
        if isinstance(video, str):
            return self._with_source(MediaItem("video", path, "video_url"), video)
        return self._with_source(MediaItem("video", path, "video_url", video=_video_options(video)), video.url)

    def _read_file(self, part: FilePart, path: str) -> MediaItem:
        """Read a file part. Its media type decides the kind; a link has none of its own, so `format` must give it."""
        source = part.file.file_data or part.file.file_id or ""
        data = _DATA.match(source)
        major = (data["type"] if data else part.file.format or "").lower().partition("/")[0]
        if major == "image":
            return self._with_source(MediaItem("image", path, "file"), source)
        if major == "video":
            return self._with_source(MediaItem("video", path, "file"), source)
        raise invalid(
            f"`{path}.file` must be an image or a video: a data URL, or a link with `format`.", f"{path}.file"
        )

    def _with_source(self, item: MediaItem, url: str) -> MediaItem:
        """Return `item` with its URL or its bytes."""
        where = item.param
        if url[:5].lower() == "data:":
            return msgspec.structs.replace(item, data=self._decode_upload(item.kind, url, where))
        if len(url) > MAX_URL_CHARS:
            raise invalid(f"`{where}` has {len(url)} characters; a link may have {MAX_URL_CHARS}.", where)
        if not _LINK.fullmatch(url):
            raise invalid(f"`{where}` must be an http or https link, or a base64 data URL.", where)
        return msgspec.structs.replace(item, url=url)

    def _decode_upload(self, kind: MediaKind, url: str, where: str) -> bytes:
        head = _DATA.match(url)
        if head is None:
            raise invalid(f"`{where}` is not a data URL of the form data:{kind}/...;base64,...", where)
        if not head["type"].lower().startswith(f"{kind}/"):
            raise invalid(f"`{where}` has the media type {head['type']:.100}; it must be {kind}/*.", where)
        # Checked before decoding: four characters of base64 are three bytes.
        size = (len(url) - head.end()) // 4 * 3
        if size > self.max_bytes + 2:
            raise invalid(f"`{where}` has about {size} bytes; the limit is {self.max_bytes}.", where)
        try:
            data = base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(f"`{where}` is not valid base64: {error}.", where) from None
        if not data:
            raise invalid(f"`{where}` is empty.", where)
        if len(data) > self.max_bytes:
            raise invalid(f"`{where}` has {len(data)} bytes; the limit is {self.max_bytes}.", where)
        return data


def _video_options(video: VideoURL) -> VideoOptions:
    return VideoOptions(
        fps=video.fps,
        min_frames=video.min_frames,
        max_frames=video.max_frames,
        target_frames=video.target_frames,
        frames_sample=video.frames_sample,
    )
