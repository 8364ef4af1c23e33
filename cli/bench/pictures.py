"""Pictures of `millrace bench serve`: one JPEG of noise, as a question, with other bytes each time or always the same.

What makes bytes others is a comment in the file, so that drawing pictures does not take the client's time.
"""

import base64
import io
import random
import secrets

from PIL import Image, ImageFilter

MARK_BYTES = 16
QUALITY = 85
SOI = 2  # bytes of a JPEG's start
QUESTION = "What is in this picture?"


class Pictures:
    """Questions about a picture of a size."""

    def __init__(self, size: tuple[int, int]) -> None:
        """Draw it: soft noise, which is as large as a photograph of this size."""
        drawn = Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))
        buffer = io.BytesIO()
        drawn.filter(ImageFilter.GaussianBlur(2)).save(buffer, "JPEG", quality=QUALITY)
        self._jpeg = buffer.getvalue()

    def question(self, seen: bool) -> list[dict[str, object]]:
        """Return the messages of a request. `seen`: about the same bytes as all others of this kind."""
        mark = bytes(MARK_BYTES) if seen else secrets.token_bytes(MARK_BYTES)
        comment = b"\xff\xfe" + (MARK_BYTES + 2).to_bytes(2, "big") + mark
        data = base64.b64encode(self._jpeg[:SOI] + comment + self._jpeg[SOI:]).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
        return [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}]
