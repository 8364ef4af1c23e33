"""Files that are there and cannot be read are named with the reason, before any reader fails on them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import CheckpointError
from shared.model.foreign_checkpoints import INDEX, refuse_foreign

SHARD = "model-00001-of-00002.safetensors"


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("../../elsewhere/file")


def link_of_a_hub_cache(path: Path) -> None:
    path.symlink_to("../../blobs/5d0f")


def named_pipe(path: Path) -> None:
    """Opening it would wait for a writer."""
    os.mkfifo(path)


NO_FILE = "where there is no file"
FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (link_to_itself, "is a symbolic link to"),
    (link_to_nothing, f"is a symbolic link to ../../elsewhere/file, {NO_FILE}; copy the file itself"),
    (link_of_a_hub_cache, f"is a symbolic link to ../../blobs/5d0f, {NO_FILE}; of a hub cache, mount or copy"),
    (named_pipe, "is not a regular file"),
    (Path.mkdir, "is a directory and not a file"),
]


@pytest.mark.parametrize(("spoil", "reason"), FAULTS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "preprocessor_config.json", INDEX, SHARD])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(tmp_path / name)
    with pytest.raises(CheckpointError) as refused:
        refuse_foreign(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}: {name} {reason}")


@pytest.mark.parametrize(("spoil", "_reason"), FAULTS)
def test_files_that_no_service_reads_may_be_broken(tmp_path: Path, spoil: Callable[[Path], None], _reason: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": SHARD}}))
    for name in ("README.md", "notes.json", "consolidated.safetensors"):
        spoil(tmp_path / name)
    refuse_foreign(tmp_path)


def test_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0)
    if os.geteuid() == 0:  # root may read everything, so the refusal of its open is made up
        monkeypatch.setattr(Path, "open", refused_open)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Permission denied; let the user who runs"):
        refuse_foreign(tmp_path)


def test_a_directory_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(CheckpointError, match=f"^{tmp_path} cannot be read: Permission denied$"):
        refuse_foreign(tmp_path)


def refused_open(path: Path, *_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", str(path))
