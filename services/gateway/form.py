"""How an answer is written, kept with the request, so that any gateway can go on writing it."""

import msgspec

from shared.errors import ProtocolError


class Form(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a gateway must know of a request that it did not take itself. The other stages carry it unread."""

    model: str = ""  # the name that the client called the model by
    n: int = 1
    include_usage: bool = False
    token_ids: bool = False
    logprobs: bool = False
    owner: str = ""  # digest of the API key; empty: everybody's
    key: str = (
        ""  # digest of the Idempotency-Key; empty: the client gave none, so it wants the answer on this connection
    )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Form)


def encode(form: Form) -> bytes:
    """`Request.form`."""
    return _encoder.encode(form)


def decode(data: bytes) -> Form:
    """The inverse of `encode`.

    Raises:
        ProtocolError: a gateway of another version wrote it.
    """
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"unreadable form of an answer: {error}") from error
