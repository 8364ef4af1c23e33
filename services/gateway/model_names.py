"""What clients may call the model."""

import msgspec

from shared.errors import Failure, RequestError

MAX_CHARS = 256  # every chunk of a stream repeats the name


class ModelNames(msgspec.Struct, frozen=True):
    """The names of the one model that is served."""

    directory: str  # the checkpoint's, which names the model where nothing else does
    served: tuple[str, ...] = ()  # the only ones accepted; empty: any

    @property
    def listed(self) -> tuple[str, ...]:
        """The names that GET /v1/models shows."""
        return self.served or (self.directory,)

    def resolve(self, asked: str | None) -> str:
        """Return the name that the answer repeats: the one asked for, or the first of ours where none was given.

        Raises:
            RequestError: 404, served names are set and this is none of them.
        """
        if not asked:
            return self.listed[0]
        if self.served and asked not in self.served:
            raise RequestError(
                Failure(
                    404,
                    f"The model {asked[:MAX_CHARS]!r} does not exist; see GET /v1/models.",
                    param="model",
                    code="model_not_found",
                )
            )
        return asked
