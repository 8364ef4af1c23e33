"""A request as it is understood, whichever API it came by."""

import msgspec

from services.gateway.request.schemas import ChatRequest


class Statement(msgspec.Struct, frozen=True):
    """Meaning of a body, and whatever its API wants to know again when the answer is written."""

    request: ChatRequest
    warnings: tuple[str, ...] = ()  # of what was ignored or replaced in the body
    dialect: str = ""  # name of the API
    kept: bytes = b""  # for the API to write the answer with; kept with the request
