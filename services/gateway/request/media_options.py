"""Sizes and sampling of an image or a video: what its part states, and what the request states of all of its kind."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from services.gateway.request.conversation import (
    FileData,
    ImageURL,
    MediaFields,
    MediaPart,
    Sampling,
    VideoURL,
)
from services.gateway.request.schemas import MediaKwargs
from shared.errors import invalid
from shared.messages import MediaKind, VideoOptions

LOW_DETAIL_PIXELS = 512 * 512  # of what OpenAI shows the model where `detail` is low

_BOUNDS = ("min_pixels", "max_pixels")
_SAMPLING = VideoOptions.__struct_fields__
# Those that Sampling does not give a type.
_UNSUPPORTED = tuple(f.name for f in msgspec.structs.fields(Sampling) if f.type is Any)


class MediaOptions(msgspec.Struct, frozen=True):
    """Bounds of the pixels, and the sampling of a video's frames. None: not stated."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    wished_max_pixels: int | None = None
    video: VideoOptions = VideoOptions()


def own_options(
    part: MediaPart, given: str | ImageURL | VideoURL | FileData, kind: MediaKind, path: str, field: str
) -> dict[str, Any]:
    """Return what a part states, by name: beside its link, or in the object with it, which wins.

    Raises:
        RequestError: 400 naming a field that this server cannot honour, or not for this kind.
    """
    refused = _UNSUPPORTED if kind == "video" else (*_UNSUPPORTED, *_SAMPLING)
    stated: dict[str, Any] = {}
    for holder, where in _holders(part, given, path, field):
        for name in refused:
            if (value := getattr(holder, name)) and value != -1:
                why = (
                    "is not supported by this server" if name in _UNSUPPORTED else "is a video's, and this is an image"
                )
                raise invalid(f"`{where}.{name}` {why}.", f"{where}.{name}", "unsupported_parameter")
        found = {name: getattr(holder, name, None) for name in (*_BOUNDS, *_SAMPLING, "detail")}
        stated.update({name: value for name, value in found.items() if value is not None})
    if kind == "image":
        stated = {name: value for name, value in stated.items() if name not in _SAMPLING}
    return stated


def resolve_options(own: Mapping[str, Any], kind: MediaKind, sizes: MediaKwargs | None) -> MediaOptions:
    """Return a part's own options, and those of the request that it does not state itself."""
    of_request = MediaOptions() if sizes is None else _of_kind(sizes, kind)
    sampling = {name: own[name] for name in _SAMPLING if name in own}
    # There is one way to say how many frames: the part's excludes the request's.
    if (own.get("target_frames") or 0) > 0:
        sampling.setdefault("fps", None)
    if (own.get("fps") or 0) > 0:
        sampling.setdefault("target_frames", None)
    return MediaOptions(
        own.get("min_pixels", of_request.min_pixels),
        own.get("max_pixels", of_request.max_pixels),
        LOW_DETAIL_PIXELS if own.get("detail") == "low" and "max_pixels" not in own else None,
        msgspec.structs.replace(of_request.video, **sampling),
    )


def _holders(
    part: MediaPart, given: str | ImageURL | VideoURL | FileData, path: str, field: str
) -> Iterator[tuple[MediaFields, str]]:
    yield part, path
    if not isinstance(given, str):
        yield given, f"{path}.{field}"


def _of_kind(sizes: MediaKwargs, kind: MediaKind) -> MediaOptions:
    if kind == "image":
        return MediaOptions(sizes.image_min_pixels, sizes.image_max_pixels)
    video = VideoOptions(**{name: getattr(sizes, f"video_{name}") for name in _SAMPLING})
    return MediaOptions(sizes.video_min_pixels, sizes.video_max_pixels, video=video)
