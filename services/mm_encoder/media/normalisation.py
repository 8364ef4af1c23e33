"""Mean and standard deviation that pixels are normalised with: preprocessor_config.json's, else CLIP's."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD
from shared.errors import CheckpointError

FILE = "preprocessor_config.json"

Channels = tuple[float, float, float]
Scales = tuple[Annotated[float, Meta(gt=0)], Annotated[float, Meta(gt=0)], Annotated[float, Meta(gt=0)]]


class Normalisation(msgspec.Struct, frozen=True):
    """Mean and deviation per channel, on a scale of 0 to 1. The file's other fields are not read: settings decide."""

    image_mean: Channels = CLIP_MEAN
    image_std: Scales = CLIP_STD

    @property
    def identity(self) -> bytes:
        """Return the part of the cache key that stands for it: embeddings depend on it as on the weights."""
        return msgspec.json.encode((self.image_mean, self.image_std))


def load_normalisation(directory: Path) -> Normalisation:
    """Read preprocessor_config.json; without one, return CLIP's.

    Raises:
        CheckpointError: the file cannot be read or a field is malformed.
    """
    path = directory / FILE
    if not path.is_file():
        return Normalisation()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Normalisation)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise CheckpointError(f"{path}: {error}") from error
