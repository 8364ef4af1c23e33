"""Images and videos for tests, encoded with real codecs."""

import io
import tempfile

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.mm_encoder.media.patches import Patches
from services.mm_encoder.media.processor import ImagePlan, Processor, VideoPlan


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def image_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def patches_of(processor: Processor, plan: ImagePlan | VideoPlan, data: bytes) -> Patches:
    """Return what a decoder process makes of a file, made in this one."""
    rows = np.empty(plan.rows, np.uint8)
    return Patches(rows, processor.fill(plan, data, rows))


def picture(height: int, width: int, kind: str = "PNG", seed: int = 0) -> bytes:
    return image_bytes(Image.fromarray(noise(height, width, seed=seed)), kind)


def video_frames(count: int, height: int = 120, width: int = 160) -> list[NDArray[np.uint8]]:
    """Return grey frames, frame i of level 6i, so that it differs from its neighbours even after a lossy codec."""
    return [np.full((height, width, 3), 6 * i % 256, np.uint8) for i in range(count)]


def video_bytes(
    frames: list[NDArray[np.uint8]],
    container: str = "mp4",
    codec: str = "libx264",
    *,
    fps: int = 10,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> bytes:
    with tempfile.NamedTemporaryFile() as out:  # faststart reads back what it has written
        _encode(out.name, frames, container, codec, fps, pixels, options or {}, codec_options or {})
        return out.read()


def _encode(
    path: str,
    frames: list[NDArray[np.uint8]],
    container: str,
    codec: str,
    fps: int,
    pixels: str,
    options: dict[str, str],
    codec_options: dict[str, str],
) -> None:
    with av.open(path, "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2] if frames else (120, 160)
        stream.pix_fmt = pixels
        stream.options = codec_options
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if frames:
            file.mux(stream.encode())


def wav_bytes() -> bytes:
    """Return a file with sound and no picture."""
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
    return out.getvalue()
