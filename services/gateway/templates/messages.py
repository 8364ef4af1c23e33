"""Messages between the gateway and a process that renders templates: msgpack."""

from typing import Any

import msgspec

from services.gateway.request.template import RawText, TemplateSource
from shared.errors import Failure

_RAW, _LARGE = 1, 2  # extension types of msgpack
_MAX_INT = (1 << 63) - 1  # msgpack has no form for integers that are larger


class Setup(msgspec.Struct, frozen=True):
    """First message; it is answered by an empty one."""

    max_chars: int  # of one rendered prompt
    memory_bytes: int  # the most of the process


class RenderTask(msgspec.Struct, frozen=True):
    """Task to render a template within `cpu_s` seconds; without variables, only to compile it."""

    template: TemplateSource
    variables: dict[str, Any] | None
    cpu_s: int


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """Answer: the prompt."""

    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Answer: the conversation cannot be rendered, whatever the template."""

    failure: Failure


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Answer: the template is at fault; `what` says what it did."""

    what: str


Reply = Rendered | Refused | Failed


class _LargeInt(int):
    """Integer beyond 64 bits, of a kind that the encoder asks us about."""


def _encode_other(value: Any) -> msgspec.msgpack.Ext:
    code = _RAW if isinstance(value, RawText) else _LARGE
    return msgspec.msgpack.Ext(code, str(value).encode())


def _decode_other(code: int, data: memoryview) -> Any:
    text = str(data, "utf-8")
    return RawText(text) if code == _RAW else int(text)


def _wrap_large(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _wrap_large(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_wrap_large(item) for item in value]
    return _LargeInt(value) if isinstance(value, int) and abs(value) > _MAX_INT else value


def encode_task(task: RenderTask) -> bytes:
    """Encode a task with its texts of JSON and its integers of any size."""
    try:
        return _encoder.encode(task)
    except OverflowError:
        return _encoder.encode(msgspec.structs.replace(task, variables=_wrap_large(task.variables)))


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
encode = msgspec.msgpack.Encoder().encode
decode_setup = msgspec.msgpack.Decoder(Setup).decode
decode_task = msgspec.msgpack.Decoder(RenderTask, ext_hook=_decode_other).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
