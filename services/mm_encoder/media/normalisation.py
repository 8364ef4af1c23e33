"""The mean and standard deviation that pixels are normalised with: preprocessor_config.json's, else CLIP's."""

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
    """Per channel, on a scale of 0 to 1. The file's other fields do not decide here: the server's settings do."""

    image_mean: Channels = CLIP_MEAN
    image_std: Scales = CLIP_STD

    @property
    def identity(self) -> bytes:
        """Embeddings depend on it as on the weights."""
        return msgspec.json.encode((self.image_mean, self.image_std))


def load_normalisation(directory: Path) -> Normalisation:
    """
    Raises:
        CheckpointError: the file is there and not what it should be.
    """
    path = directory / FILE
    if not path.is_file():
        return Normalisation()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Normalisation)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise CheckpointError(f"{path}: {error}") from error
