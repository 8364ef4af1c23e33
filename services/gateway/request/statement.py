"""A request as it is understood, whichever API it came by."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from services.gateway.request.schemas import ChatRequest
from shared.errors import RequestError
from shared.messages import Grammar


class Statement(msgspec.Struct, frozen=True):
    """Meaning of a body, and whatever its API wants to know again when the answer is written."""

    request: ChatRequest
    warnings: tuple[str, ...] = ()  # of what was ignored or replaced in the body
    dialect: str = ""  # name of the API
    kept: bytes = b""  # for the API to write the answer with; kept with the request
    # Texts or token ids that are each given to the model as they are, in place of a conversation; (): there is one.
    prompts: tuple[str | list[int], ...] = ()
    first_usage: bool = False  # the answer begins with the usage of the prompt
    rename: Callable[[str], str] = str  # gives a field of `request` the path of the field of the body that it came from

    @contextmanager
    def own_names(self) -> Iterator[None]:
        """Have errors name the fields of the body.

        Raises:
            RequestError: one was raised; it names the field by the path in the body.
        """
        try:
            yield
        except RequestError as error:
            param = error.failure.param
            if param is None or (own := self.rename(param)) == param:
                raise
            text = error.failure.message.replace(f"`{param}`", f"`{own}`")
            raise RequestError(msgspec.structs.replace(error.failure, message=text, param=own)) from error

    def renamed(self, grammar: Grammar) -> Grammar:
        """Return a grammar that is named after the field of the body."""
        return msgspec.structs.replace(grammar, param=self.rename(grammar.param))
