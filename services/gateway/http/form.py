"""Reader of a form with one file (multipart/form-data), whose content is passed on while it arrives."""

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from shared.errors import Failure, RequestError, invalid

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # which exists for type checkers alone

MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096
MAX_NAME_CHARS = 255
FILE = "file"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Form(msgspec.Struct):
    """Fields of a form, as far as they have arrived."""

    fields: dict[str, str] = {}
    filename: str | None = None  # once the file has begun


class FormReader:
    """Parser of the parts of one form."""

    def __init__(self, content_type: str) -> None:
        """
        Raises:
            RequestError: 415, it is no form; 400, its boundary is malformed.
        """
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            text = f"The header Content-Type is {content_type[:50]!r}; a file is sent as multipart/form-data."
            raise RequestError(Failure(415, text, param="Content-Type", code="unsupported_media_type"))
        self.form = Form()
        self.ended = False
        self._header = [bytearray(), bytearray()]  # name and value
        self._disposition = b""
        self._name = ""
        self._value = bytearray()
        self._content: list[bytes] = []
        callbacks: MultipartCallbacks = {
            "on_header_field": self._adder(0),
            "on_header_value": self._adder(1),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_part,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        with _as_invalid():
            self._parser = MultipartParser(options[b"boundary"], callbacks)

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the body; return those of the file's content among them.

        Raises:
            RequestError: 400, this is no form with one file.
        """
        with _as_invalid():
            self._parser.write(data)
        content, self._content = b"".join(self._content), []
        return content

    def close(self) -> None:
        """Let go of the parser, which refers back: what both hold is then freed at once."""
        del self._parser

    def _adder(self, place: int) -> Callable[[bytes, int, int], None]:
        def add(data: bytes, start: int, end: int) -> None:
            self._header[place] += data[start:end]

        return add

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = [bytearray(), bytearray()]

    def _begin_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._disposition = b""
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name in self.form.fields or (self._name == FILE and self.form.filename is not None):
            raise invalid(f"`{self._name[:64]}` stands twice in the form.", self._name[:64])
        if self._name == FILE:
            given = options.get(b"filename", b"").decode("utf-8", "replace")
            if _CONTROL.search(given):
                raise invalid("The name of `file` has control characters.", FILE)
            self.form.filename = given[-MAX_NAME_CHARS:] or FILE
        elif len(self.form.fields) >= MAX_FIELDS:
            raise invalid(f"The form has more than {MAX_FIELDS} fields.", self._name[:64])

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE:
            self._content.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise invalid(f"`{self._name[:64]}` is longer than {MAX_FIELD_BYTES} bytes.", self._name[:64])

    def _end_part(self) -> None:
        if self._name != FILE:
            self.form.fields[self._name] = self._value.decode("utf-8", "replace")
            self._value.clear()

    def _end(self) -> None:
        self.ended = True


@contextmanager
def _as_invalid() -> Iterator[None]:
    """
    Raises:
        RequestError: 400, in place of what the parser raises.
    """
    try:
        yield
    except FormParserError as error:
        raise invalid(f"The body is not valid multipart/form-data: {error}", FILE) from error


async def read_form(request: Request, reader: FormReader) -> AsyncIterator[bytes]:
    """Yield the content of the form's file while it arrives.

    Raises:
        RequestError: 400, this is no form with one file.
        ClientDisconnect: the client left in the middle.
    """
    try:
        async for data in request.stream():
            if content := reader.feed(data):
                yield content
    finally:
        reader.close()
    if not reader.ended or reader.form.filename is None:
        raise invalid("The form has no `file`." if reader.ended else "The form ends before its last boundary.", FILE)
