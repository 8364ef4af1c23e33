"""Files of a model directory that are there and cannot be read: no permission, a broken link, a directory in its place.

Every reader would fail on them with words of its own, and some with a traceback, so they are looked for first.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

# What the services read besides safetensors. Whatever else is in a directory may be broken.
NAMES = frozenset(
    (
        *("config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors.index.json"),
        *("tokenizer.model", "spm.model", "ernie_token_100k.model", "tokenizer.json", "tokenizer_config.json"),
        *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
        *("Roboto-Regular.ttf",),
    )
)
_HUB_BLOBS = "blobs"


def read_by_services(name: str, shards: Collection[str]) -> bool:
    """Return True for the name of a file that is read. `shards` are those that the index names, if there is one."""
    return name in NAMES or (name in shards if shards else name.endswith(".safetensors"))


def unreadable_files(directory: Path, shards: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each file that is read and cannot be: its name, what is wrong, what to do."""
    for path in sorted(directory.iterdir()):
        if read_by_services(path.name, shards) and (fault := _fault(path)):
            yield f"{path.name} {fault}"


def _fault(path: Path) -> str | None:
    if path.is_symlink() and not path.exists():
        return _broken_link(os.readlink(path))
    if not path.is_file():
        return "is a directory and not a file" if path.is_dir() else "is not a regular file"
    try:
        path.open("rb").close()
    except OSError as error:
        return f"cannot be read: {error.strerror}; let the user who runs Millrace read it"
    return None


def _broken_link(target: str) -> str:
    advice = "copy the file itself"
    if _HUB_BLOBS in Path(target).parts:
        advice = "of a hub cache, mount or copy the whole folder models--..., since snapshots/ has links into blobs/"
    return f"is a symbolic link to {target}, where there is no file; {advice}"
