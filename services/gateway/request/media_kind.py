"""Kind of a file by its first bytes, for files whose media type says nothing."""

import re

from shared.messages import MediaKind

_IMAGE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|II[*+]\0|MM\0[*+]|....ftyp(?:avif|avis|heic|heix|heim|heis|mif1|msf1)",
    re.DOTALL,
)
# ISO media, Matroska, AVI, FLV, ASF, Ogg, MPEG transport (cameras have a time before each packet) and program streams.
_VIDEO = re.compile(
    rb"....ftyp|....moov|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01|\x30\x26\xb2\x75|OggS"
    rb"|\x47.{187}\x47|....\x47.{191}\x47|\0\0\x01\xba",
    re.DOTALL,
)


def kind_of(data: bytes) -> MediaKind | None:
    """Return the kind, None if the bytes are of no format that is known. An animated GIF is an image here."""
    if _IMAGE.match(data):
        return "image"
    return "video" if _VIDEO.match(data) else None
