"""How an answer is written, kept with the request, so that any gateway can go on writing it."""

import msgspec

from shared.errors import ProtocolError
from shared.messages import unpack_ids


class Form(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a gateway must know of a request that it did not take itself. The other stages carry it unread."""

    model: str = ""  # the name that the client called the model by
    n: int = 1
    include_usage: bool = False
    token_ids: bool = False
    logprobs: bool = False
    prompt: bytes | None = None  # packed ids, for who asked for token ids
    owner: str = ""  # digest of the API key; empty: everybody's
    key: str = (
        ""  # digest of the Idempotency-Key; empty: the client gave none, so it wants the answer on this connection
    )

    @property
    def prompt_ids(self) -> list[int] | None:
        return None if self.prompt is None else unpack_ids(self.prompt)


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
