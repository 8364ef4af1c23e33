"""Facts of a replica that all replicas of a deployment must agree on, since answers and routing depend on them.

A replica publishes its facts in its lease; none joins that differs from one that lives (shared/bus/leases.py). Where
two replicas have no fact in common, as two services may, they have nothing to disagree about.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from shared.config import CommonSettings
from shared.errors import CheckpointError
from shared.model.tokenizer_files import SENTENCEPIECE_FILES

FILES = {
    "config.json": ("config.json", "preprocessor_config.json"),
    "tokenizer": (*SENTENCEPIECE_FILES, "tokenizer.json", "added_tokens.json"),
}
SAMPLES = 16  # places of each file of weights that are compared, beside its size
SAMPLE_BYTES = 4096


def facts(settings: CommonSettings) -> dict[str, str]:
    """Return the facts of a replica with these settings.

    Raises:
        CheckpointError: a file of the model directory cannot be read.
    """
    directory = Path(settings.model)
    try:
        found = {name: _digest(map((directory / "").joinpath, files)) for name, files in FILES.items()}
        found["weights"] = _digest_samples(sorted(directory.glob("*.safetensors")))
    except OSError as error:
        raise CheckpointError(f"{directory}: {error.strerror or error}") from error
    numbers = {"max_model_len": str(settings.max_model_len), "shards": str(settings.shards)}
    return {name: value for name, value in (numbers | found | settings.facts()).items() if value}


def _digest(files: Iterator[Path]) -> str:
    """Return a digest of those files that exist; empty if there is none."""
    digest, present = hashlib.sha256(), [file for file in files if file.is_file()]
    for file in present:
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()[:12] if present else ""


def _digest_samples(files: list[Path]) -> str:
    """Return a digest of names, sizes and samples of files that are too large to be read; empty if there is none."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for n in range(SAMPLES):
                file.seek(size * n // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12] if files else ""
