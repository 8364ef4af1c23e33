"""Format of an answer, stored with the request so that any gateway can write the answer or resume it."""

import msgspec

from shared.errors import ProtocolError


class AnswerFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything a gateway needs to write the answer of a request that another gateway accepted.

    The other stages carry it unread (`Request.form`).
    """

    model: str = ""  # the name that the client called the model by
    n: int = 1
    include_usage: bool = False
    token_ids: bool = False
    logprobs: bool = False
    owner: str = ""  # name or digest of the API key; empty: there are no keys, and everybody may read the answer
    key: str = ""  # digest of the Idempotency-Key; empty: none was given, so a disconnect cancels the request
    continuous_usage: bool = False  # in every chunk of a stream
    dialect: str = ""  # name of the API in whose words the answer is written
    kept: bytes = b""  # what that API's own part of the gateway wants to know of the request by then
    prompt_logprobs: bool = False
    prompts: int = 1  # that the request has; its choices are the answers to the first, then to the second
    outlives: bool = False  # its connection: who leaves does not cancel it


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnswerFormat)


def encode(answer_format: AnswerFormat) -> bytes:
    """Encode for `Request.form`."""
    return _encoder.encode(answer_format)


def decode(data: bytes) -> AnswerFormat:
    """Decode `Request.form`.

    Raises:
        ProtocolError: a gateway of an incompatible version wrote it.
    """
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"cannot decode the answer format of a request: {error}") from error
