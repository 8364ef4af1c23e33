"""Lines of an input file, which are requests, and of an output file, which are their answers. Pure.

{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
{"id": "batch_req_...", "custom_id": "1", "response": {"status_code": 200, "request_id": "...", "body": {...}},
 "error": null}
"""

import hashlib
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from services.gateway.request.surrogates import replace_lone_surrogates
from shared.errors import Failure, RequestError, invalid

BOM = b"\xef\xbb\xbf"
MOST_ERRORS = 100  # of one file that are told


class Line(msgspec.Struct, frozen=True):
    """Request of an input file."""

    number: int  # in the file, from 1
    custom_id: str
    body: bytes


class LineError(msgspec.Struct, frozen=True):
    """Fault of a line, or of the whole file, as a batch tells it."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class LineFault(Exception):
    """A line that is no request of its batch."""

    def __init__(self, error: LineError) -> None:
        super().__init__(error.message)
        self.error = error


class _Envelope(msgspec.Struct, frozen=True):
    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Body(msgspec.Struct, frozen=True):
    """Fields that ask for what a line has no place for, each to be read for itself: the other may be malformed."""

    stream: msgspec.Raw = msgspec.Raw(b"null")
    background: msgspec.Raw = msgspec.Raw(b"null")


_envelope = msgspec.json.Decoder(_Envelope)
_body = msgspec.json.Decoder(_Body)
_flag = msgspec.json.Decoder(bool | None, strict=False)  # as lenient as the APIs
_any = msgspec.json.Decoder(msgspec.Raw)


class LineSplitter:
    """Divider of a file's bytes into lines, however they were cut. Blank lines count, and are left out."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self.count = 0  # lines that have ended, blank ones included

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Return the lines that end in the next bytes of the file, by number.

        Raises:
            RequestError: 413, a line is too long.
        """
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._add(piece)
            yield from self.end()
        self._add(rest)

    def end(self) -> Iterator[tuple[int, bytes]]:
        """Return the line that has begun, unless it is blank: the file, or the line, has ended."""
        self.count += 1
        line = bytes(self._rest).removeprefix(BOM if self.count == 1 else b"").strip()
        self._rest.clear()
        if line:
            yield self.count, line

    def _add(self, piece: bytes) -> None:
        _check_length(len(self._rest) + len(piece), self._max_bytes, self.count + 1)
        self._rest += piece


class LineCounter:
    """Counter of the same lines, however the bytes were cut. It holds none of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._head: bytes | None = b""  # of the file, until a byte order mark can be told
        self._length = 0  # of the line that has begun
        self._is_blank = True
        self.count = 0  # lines that have ended, blank ones included
        self.filled = 0  # those that are not blank

    def feed(self, data: bytes) -> None:
        """Count the lines that end in the next bytes of the file.

        Raises:
            RequestError: 413, a line is too long.
        """
        if self._head is not None:
            data = self._head + data
            self._head = data if len(data) < len(BOM) else None
        if self._head is None:
            self._split(data)

    def end(self) -> None:
        """Count the line that has begun: the file has ended."""
        self._split(self._head or b"")
        self._end_line()

    def _split(self, data: bytes) -> None:
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._add(piece)
            self._end_line()
        self._add(rest)

    def _add(self, piece: bytes) -> None:
        is_first = not self.count and not self._length
        self._length += len(piece)
        _check_length(self._length, self._max_bytes, self.count + 1)
        self._is_blank &= not (piece.removeprefix(BOM) if is_first else piece).strip()

    def _end_line(self) -> None:
        self.count += 1
        self.filled += not self._is_blank
        self._length, self._is_blank = 0, True


def _check_length(length: int, most: int, number: int) -> None:
    """
    Raises:
        RequestError: 413.
    """
    if length > most:
        text = f"Line {number} of the file is longer than the limit of {most} bytes."
        raise RequestError(Failure(413, text, param="file", code="line_too_long"))


class LineReader:
    """Reader of the requests of one batch. It knows which ids it has seen."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._seen: set[bytes] = set()  # digests: ids may be long

    def read(self, number: int, line: bytes) -> Line:
        """Return the request of a line.

        Raises:
            LineFault: it is none.
        """
        try:
            found = _envelope.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            is_json = isinstance(error, msgspec.ValidationError)
            code, text = ("invalid_line", str(error)) if is_json else ("invalid_json_line", "This line is not JSON.")
            raise LineFault(LineError(code, text, number)) from error
        if found.method != "POST":
            raise _fault("invalid_method", "`method` must be POST.", number, "method")
        if found.url != self._endpoint:
            text = f"`url` is {found.url[:64]!r}; the batch is for {self._endpoint}."
            raise _fault("mismatched_endpoint", text, number, "url")
        if bytes(found.body)[:1] != b"{":
            raise _fault("invalid_line", "`body` must be an object.", number, "body")
        self._note(found.custom_id, number)
        return Line(number, found.custom_id, bytes(found.body))

    def _note(self, custom_id: str, number: int) -> None:
        digest = hashlib.blake2b(custom_id.encode(), digest_size=12).digest()
        if digest in self._seen:
            text = f"`custom_id` {custom_id[:64]!r} stands twice."
            raise _fault("duplicate_custom_id", text, number, "custom_id")
        self._seen.add(digest)


def check_body(body: bytes) -> None:
    """Check that a body asks for one answer that is there at once.

    Raises:
        RequestError: 400 naming the field.
    """
    try:
        asked = _body.decode(replace_lone_surrogates(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # which its API refuses in its own words
    for field, value in (("stream", asked.stream), ("background", asked.background)):
        if _is_true(value):
            raise invalid(f"`{field}` cannot be true in a batch.", field, "unsupported_parameter")


def is_json(body: bytes) -> bool:
    """Tell whether a body may be a part of a line."""
    try:
        _any.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return b"\n" not in body


def answered(batch_id: str, line: Line, status: int, request_id: str, body: bytes) -> bytes:
    """Return the line of an answer, JSON, which may be an error of the API."""
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    return _written(batch_id, line, response, None)


def unanswered(batch_id: str, line: Line, code: str, message: str) -> bytes:
    """Return the line of a request that was not run."""
    return _written(batch_id, line, None, {"code": code, "message": message})


def _is_true(value: msgspec.Raw) -> bool:
    try:
        return bool(_flag.decode(value))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False  # it is none, which its API says in its own words


def _written(batch_id: str, line: Line, response: Any, error: Any) -> bytes:
    name = f"batch_req_{batch_id.removeprefix('batch_')}-{line.number}"
    whole = {"id": name, "custom_id": line.custom_id, "response": response, "error": error}
    return msgspec.json.encode(whole) + b"\n"


def _fault(code: str, text: str, number: int, param: str) -> LineFault:
    return LineFault(LineError(code, text, number, param))
