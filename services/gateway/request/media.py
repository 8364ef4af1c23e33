"""Images and videos of a request: kind, position in the conversation, and link or uploaded bytes."""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from urllib.parse import unquote

import msgspec
from msgspec.structs import replace

from services.gateway.request.conversation import (
    FileData,
    MediaPart,
    ShownImagePart,
    stated_medium,
)
from services.gateway.request.media_kind import kind_of
from services.gateway.request.media_options import own_options, resolve_options
from services.gateway.request.schemas import ChatRequest, MediaKwargs
from shared.errors import RequestError, invalid
from shared.messages import Content, MediaKind, VideoOptions

MAX_URL_CHARS = 8192

_BARE = "data:;base64,"  # before base64 that is alone
_MAX_HEAD_CHARS = 300  # of a data URL, up to its comma
# Deleted: what folds lines. Replaced: the alphabet of URLs and file names (RFC 4648, section 5).
_FOLDS, _URL_SAFE = b" \t\r\n\f\v", bytes.maketrans(b"-_", b"+/")
# Excludes everything that URL parsers disagree on: backslashes, spaces, control characters.
_LINK = re.compile(r"https?://[^\s\\\x00-\x20\x7f]+", re.IGNORECASE)


class DataURL(msgspec.Struct, frozen=True):
    """Data URL in two parts. The type may be missing or wrong: it is read for the kind of a file part alone."""

    media_type: str  # in lower case
    start: int  # of the base64


class MediaItem(msgspec.Struct, frozen=True):
    """One image or video. Exactly one of `url` and `data` is set."""

    kind: MediaKind
    part: str  # path of the content part: messages[0].content[1]
    field: str  # the part's field that holds it
    url: str | None = None
    data: bytes | None = None
    video: VideoOptions = VideoOptions()
    min_pixels: int | None = None
    max_pixels: int | None = None
    wished_max_pixels: int | None = None  # gives way to all other bounds
    content: Content | None = None  # of `data`
    own_param: str = ""  # the path in a body of another API than chat's

    @property
    def param(self) -> str:
        """The path of the request field that errors name."""
        return self.own_param or f"{self.part}.{self.field}"


class MediaRules(msgspec.Struct, frozen=True):
    """Limits on the media of one request."""

    limits: Mapping[MediaKind, int]
    max_bytes: int  # of one upload, decoded

    def extract(self, request: ChatRequest) -> list[MediaItem]:
        """Return all media of the conversation, in order.

        Raises:
            RequestError: 400 naming the part: too many, not a data URL, wrong media type, too large, another scheme; or
                a field beside it that cannot be honoured.
        """
        parts = [
            (part, f"messages[{i}].content[{j}]")
            for i, message in enumerate(request.messages)
            if isinstance(message.content, list)
            for j, part in enumerate(message.content)
            if isinstance(part, MediaPart)
        ]
        items = [self._read_part(part, path, request.mm_processor_kwargs) for part, path in parts]
        for kind, limit in self.limits.items():
            found = [item for item in items if item.kind == kind]
            if len(found) > limit:
                where = found[limit].param
                text = f"`{where}`: too many {kind} items in prompt, got {len(found)} but limit is {limit}"
                raise invalid(f"{text} (the setting limit_mm_per_prompt; earlier turns count, too).", where)
        return items

    def _read_part(self, part: MediaPart, path: str, sizes: MediaKwargs | None) -> MediaItem:
        field, given = stated_medium(part)
        if isinstance(given, list):
            raise _frames(f"{path}.{field}")
        if isinstance(given, FileData):
            kind, source = self._read_file(given, path)
        else:
            kind = "image" if isinstance(part, ShownImagePart) else "video"
            source = given if isinstance(given, str) else given.url
        own = own_options(part, given, kind, path, field)
        options = resolve_options(own, kind, sizes)
        item = MediaItem(
            kind,
            path,
            field,
            video=options.video,
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
            wished_max_pixels=options.wished_max_pixels,
        )
        return self._with_source(item, source)

    def _read_file(self, file: FileData, path: str) -> tuple[MediaKind, str]:
        """Return the kind of a file, and its link or data URL.

        Its media type decides the kind; a link has none of its own, so `format` must give it. Bytes of an unknown type,
        or of none, decide by themselves.
        """
        where, source = f"{path}.file", file.file_data or file.file_id or ""
        data = _data_url(source)
        if data is None and not _LINK.fullmatch(source):
            if file.file_data is None:
                raise _no_file(where, file.file_id)
            source, data = f"{_BARE}{source}", DataURL("", len(_BARE))
        major = (data.media_type if data else (file.format or "").lower()).partition("/")[0]
        if data and major not in ("image", "video"):
            unknown = self._with_source(MediaItem("image", path, "file"), source)
            major = kind_of(unknown.data or b"") or ""
        if major == "image":
            return "image", source
        if major == "video":
            return "video", source
        raise invalid(f"`{where}` must be an image or a video: base64, a data URL, or a link with `format`.", where)

    def _with_source(self, item: MediaItem, url: str) -> MediaItem:
        """Return `item` with its URL or its bytes."""
        where = item.param
        if url[:5].lower() == "data:":
            data = self._decode_upload(item.kind, url, where)
            return replace(item, data=data, content=Content(hashlib.sha256(data).digest(), len(data)))
        if len(url) > MAX_URL_CHARS:
            raise invalid(f"`{where}` has {len(url)} characters; a link may have {MAX_URL_CHARS}.", where)
        if not _LINK.fullmatch(url):
            raise invalid(f"`{where}` must be an http or https link, or a base64 data URL.", where)
        return replace(item, url=url)

    def _decode_upload(self, kind: MediaKind, url: str, where: str) -> bytes:
        head = _data_url(url)
        if head is not None and kind == "video" and url.find(",", head.start) >= 0:
            raise _frames(where)
        if head is None:
            raise invalid(f"`{where}` is not a data URL of the form data:{kind}/...;base64,...", where)
        # Checked before decoding: four characters of base64 are three bytes. Folds may add to them.
        size = (len(url) - head.start) // 4 * 3
        if size > 2 * (self.max_bytes + 2):
            raise invalid(f"`{where}` has about {size} bytes; the limit is {self.max_bytes}.", where)
        try:
            data = _decode_base64(url[head.start :])
        except (binascii.Error, ValueError) as error:
            raise invalid(f"`{where}` is not valid base64: {error}.", where) from None
        if not data:
            raise invalid(f"`{where}` is empty.", where)
        if len(data) > self.max_bytes:
            raise invalid(f"`{where}` has {len(data)} bytes; the limit is {self.max_bytes}.", where)
        if _is_of_another_kind(kind, head.media_type, data):
            raise invalid(f"`{where}` has the media type {head.media_type:.100}; it must be {kind}/*.", where)
        return data


def _frames(where: str) -> RequestError:
    text = f"`{where}` is a list of frames, which this server does not take: send the video, or the frames as images."
    return invalid(text, where, "unsupported_parameter")


def _no_file(where: str, file_id: str | None) -> RequestError:
    if file_id is None:
        where = f"{where}.file_data"
        return invalid(f"Missing required field `{where}`.", where, "missing_required_parameter")
    where = f"{where}.file_id"
    text = f"`{where}`: files that were uploaded are for batches alone; send the bytes in `file_data`."
    return invalid(text, where, "unsupported_parameter")


def _data_url(url: str) -> DataURL | None:
    """Return the parts of a data URL of base64, None if it is none."""
    comma = url.find(",", 0, _MAX_HEAD_CHARS)
    scheme, _, head = url[: max(comma, 0)].partition(":")
    media_type, *parameters = (part.strip().lower() for part in head.split(";"))
    if scheme.lower() != "data" or parameters[-1:] != ["base64"]:
        return None
    return DataURL(media_type, comma + 1)


def _is_of_another_kind(kind: MediaKind, media_type: str, data: bytes) -> bool:
    """Return True if the type names the other kind and the bytes do not say otherwise. A GIF may be either."""
    other = "video/" if kind == "image" else "image/"
    return media_type.startswith(other) and kind_of(data) != kind and not data.startswith(b"GIF8")


def _decode_base64(text: str) -> bytes:
    """Decode base64 as encoders write it: folded or not, in either alphabet, escaped as in URLs, with padding or not.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # seldom, so that the usual case is one pass
        plain = (unquote(text) if "%" in text else text).encode("ascii", "strict")
    digits = plain.translate(_URL_SAFE, _FOLDS).rstrip(b"=")
    return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
