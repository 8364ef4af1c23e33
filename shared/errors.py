"""Every error Millrace raises on purpose, as a tree named by what the reader can do about it.

    MillraceError
    ├── RequestError          the client can mend it; carries the Failure the client is shown (any status)
    ├── ConfigError           whoever starts the process can mend it: names the setting
    ├── CheckpointError       the model directory is not what it should be: names the file, tensor or field
    ├── ProtocolError         a peer speaks another version of our messages
    └── FencedError           this replica lost its ownership; its writes no longer count

`Failure` is the wire and HTTP form of an error: it travels in messages, and `openai_body` is the one place where
it becomes the body OpenAI clients parse.
"""

from typing import Any

import msgspec


class Failure(msgspec.Struct, frozen=True):
    """What went wrong with one request, in OpenAI's terms.

    `status` is the HTTP status; `param` names the offending request field (``messages[0].content[1].image_url``).
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None

    @property
    def kind(self) -> str:
        """What traces call it: its code, or its status where it has none."""
        return self.code or str(self.status)

    def openai_body(self) -> dict[str, Any]:
        """The `{"error": {...}}` object of the OpenAI API."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class MillraceError(Exception):
    """Base of everything raised on purpose."""


class RequestError(MillraceError):
    """A request that is refused or failed; `failure` says how to the client."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class ConfigError(MillraceError):
    """A setting is missing, unknown or malformed. The message names it."""


class CheckpointError(MillraceError):
    """A model directory lacks something or contradicts itself. The message names the file, field or tensor."""


class ProtocolError(MillraceError):
    """A stream entry that this version cannot read."""


class FencedError(MillraceError):
    """A newer owner exists; what this one writes would be refused."""


def invalid(message: str, param: str | None, code: str = "invalid_value") -> RequestError:
    """A 400: the client sent something that can never work."""
    return RequestError(Failure(400, message, param=param, code=code))


def context_length(prompt_tokens: int, max_model_len: int, param: str = "messages") -> RequestError:
    """A 400: the prompt leaves no room for one generated token."""
    return invalid(
        f"`{param}`: the prompt has {prompt_tokens} tokens; this model's maximum context length is {max_model_len} "
        "tokens, and at least one must be left for the answer.",
        param,
        "context_length_exceeded",
    )


def internal(message: str, code: str = "internal_error", status: int = 500) -> RequestError:
    """A 5xx: our fault, or a dependency's."""
    return RequestError(Failure(status, message, type="server_error", code=code))
