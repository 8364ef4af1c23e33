"""Tree of all errors that Millrace raises on purpose, named by what their reader can do about them.

    MillraceError
    ├── RequestError          a request is refused or failed; carries the Failure that the client is shown (any status)
    ├── ConfigError           a setting is wrong; the operator can correct it: names the setting
    ├── CheckpointError       the model directory is incomplete or malformed: names the file, tensor or field
    ├── ProtocolError         an entry or record cannot be read: it is damaged,
    │   └── NewerVersionError     or of a newer version of our messages
    └── FencedError           a write was refused for its fencing token: another replica owns the shard now

`Failure` is the wire and HTTP form of an error: it travels in messages, and `openai_body` alone turns it into the
body that OpenAI clients parse.
"""

from typing import Any

import msgspec


class Failure(msgspec.Struct, frozen=True):
    """Failure of one request, in OpenAI's terms.

    `status` is the HTTP status; `param` names the offending request field (``messages[0].content[1].image_url``).
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None

    @property
    def kind(self) -> str:
        """Name of the failure in traces: its code, or its status if it has none."""
        return self.code or str(self.status)

    def openai_body(self) -> dict[str, Any]:
        """Return the `{"error": {...}}` object of the OpenAI API."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class MillraceError(Exception):
    """Base class of the errors raised on purpose."""


class RequestError(MillraceError):
    """Refusal or failure of a request; `failure` is shown to the client."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class ConfigError(MillraceError):
    """Missing, unknown or malformed setting. The message names it."""


class CheckpointError(MillraceError):
    """Incomplete or contradictory model directory. The message names the file, field or tensor."""


class ProtocolError(MillraceError):
    """Stream entry or record that this version cannot read."""


class NewerVersionError(ProtocolError):
    """Stream entry or record of a version that only newer replicas read."""

    def __init__(self, version: int) -> None:
        super().__init__(f"version {version} of our messages; this process reads none that new")
        self.version = version


class FencedError(MillraceError):
    """Write refused for its fencing token: another replica owns the shard."""


def invalid(message: str, param: str | None, code: str = "invalid_value") -> RequestError:
    """Return a 400: the client sent something that can never work."""
    return RequestError(Failure(400, message, param=param, code=code))


def context_length(prompt_tokens: int, max_model_len: int, param: str = "messages") -> RequestError:
    """Return a 400: the prompt leaves no room for one generated token."""
    return invalid(
        f"`{param}`: the prompt has {prompt_tokens} tokens; this model's maximum context length is {max_model_len} "
        "tokens, and at least one must be left for the answer.",
        param,
        "context_length_exceeded",
    )


def unreadable(what: str) -> Failure:
    """Return a 500: bytes that Redis keeps for a request are damaged, so that nobody can go on with it."""
    return internal(f"The server cannot read {what} of this request, and has ended it.", "unreadable_state").failure


def internal(message: str, code: str = "internal_error", status: int = 500) -> RequestError:
    """Return a 5xx: our fault, or a dependency's."""
    return RequestError(Failure(status, message, type="server_error", code=code))


def release_frames(error: BaseException) -> None:
    """Let go of the frames that an error has passed, once it was answered.

    They hold a request's body and media, and often the task that raised it: a reference cycle, which only the garbage
    collector would end.
    """
    passed = [error]
    while passed:
        one = passed.pop()
        passed += [each for each in (one.__cause__, one.__context__) if each is not None]
        passed += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        one.__traceback__ = one.__cause__ = one.__context__ = None
