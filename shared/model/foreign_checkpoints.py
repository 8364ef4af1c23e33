"""Detection of model directories in unsupported formats, so that the error names the format and what to do.

The signs are file names, the headers of safetensors files and config.json. A directory without a sign goes on to
`shared/model/checkpoint.py`, which names what is wrong with it tensor by tensor.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CheckpointError
from shared.model.config import online_quantization
from shared.model.stored_quantization import SUFFIXES, stored_layout, unusable
from shared.model.unreadable_files import read_by_services, unreadable_files

INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

HUB = "baidu/ERNIE-4.5-VL-28B-A3B-Thinking"
_UNQUANTISED = (
    f"use the unquantised safetensors repository instead ({HUB}), which --quantization wint8 or wint4 quantises as it "
    "loads"
)
_PADDLE = (
    f"Paddle format; use the safetensors repository in PyTorch's layout instead ({HUB}, or the one that ends in -PT)"
)


def refuse_foreign(directory: Path) -> None:
    """Refuse a directory of a format that is not read, or with a file that cannot be.

    Raises:
        CheckpointError: the directory holds another format; the message says which, by what sign, and what to do. Or
            the directory, or a file in it, cannot be read.
    """
    try:
        found = _Signs.read(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror or error}") from error
    for recognise in _FORMATS:
        if sentence := recognise(found):
            raise CheckpointError(f"{directory}: {sentence}")


@dataclass(frozen=True, slots=True)
class _Signs:
    """Signs of a directory's format, found without reading a tensor."""

    files: Collection[str]
    folders: Collection[str]
    unreadable: Collection[str]  # sentences, each about a file
    pointers: Collection[str]  # files to be read that Git LFS has not replaced by their content
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of tensors, by stored name; () where only the index names one

    @staticmethod
    def read(directory: Path) -> "_Signs":
        """Collect the signs. An absent or malformed file gives none; its own reader says what is wrong.

        Raises:
            OSError: the directory cannot be listed.
        """
        entries = sorted(directory.iterdir()) if directory.is_dir() else []
        files = [entry for entry in entries if entry.is_file()]
        index = _json(directory / INDEX).get("weight_map")
        listed: dict[str, Any] = index if isinstance(index, dict) else {}
        shards = {name for name in listed.values() if isinstance(name, str)}
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(listed, ())
        for path in files:
            if path.suffix == ".safetensors":
                shapes |= _header_shapes(path)
        return _Signs(
            files=[path.name for path in files],
            folders=[entry.name for entry in entries if entry.is_dir()],
            unreadable=list(unreadable_files(directory, shards)) if entries else [],
            pointers=[
                path.name for path in files if read_by_services(path.name, shards) and _starts_with(path, LFS_POINTER)
            ],
            config=_json(directory / "config.json"),
            shapes=shapes,
        )

    def file(self, *endings: str) -> str | None:
        """Return the first file with one of these endings."""
        return next((name for name in self.files if name.endswith(endings)), None)

    def tensor(self, *, end: tuple[str, ...] = (), start: tuple[str, ...] = (), within: str = "") -> str | None:
        """Return the first tensor whose name has one of these ends or starts, or has `within` in it."""
        for name in self.shapes:
            if name.endswith(end) or name.startswith(start) or (within and within in name):
                return name
        return None

    @property
    def quantization(self) -> dict[str, Any]:
        """Return config.json's quantization_config, or {} for the online form: it does not describe stored weights."""
        value = self.config.get("quantization_config")
        return value if isinstance(value, dict) and online_quantization(value) is None else {}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # or opening a named pipe would wait
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _starts_with(path: Path, prefix: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(prefix)) == prefix
    except OSError:
        return False


def _header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read a safetensors header: eight bytes of length, then JSON from names to dtypes, shapes and places."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= MAX_HEADER_BYTES else {}
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


# ------------------------------------------------------------------------------- one function a format: its sentence


def _unreadable(found: _Signs) -> str | None:
    return next(iter(found.unreadable), None)


def _git_lfs(found: _Signs) -> str | None:
    if not found.pointers:
        return None
    name = next(iter(found.pointers))
    return f"{name} is a Git LFS pointer and not the file itself; run `git lfs pull` where the repository was cloned"


def _hub_cache(found: _Signs) -> str | None:
    if "config.json" in found.files or "snapshots" not in found.folders:
        return None
    return "the root of a hub cache and not a model; give the directory below snapshots/ that has the config.json"


def _adapter(found: _Signs) -> str | None:
    if "adapter_config.json" not in found.files or "config.json" in found.files:
        return None
    return "a PEFT adapter (adapter_config.json) and not a model; merge it into its base model and save that"


def _without_safetensors(found: _Signs) -> str | None:
    """Recognise formats that live in files of their own. Beside safetensors they are leftovers."""
    if found.shapes or found.file(".safetensors"):
        return None
    if name := found.file(".gguf"):
        return f"{name} is GGUF, llama.cpp's format, which is not read; {_UNQUANTISED}"
    if name := found.file(".pdparams", ".pdiparams", ".pdmodel"):
        return f"{name} is in {_PADDLE}"
    if name := found.file("pytorch_model.bin", ".pt", ".pth") or found.file("pytorch_model.bin.index.json"):
        return (
            f"{name} is pickled by PyTorch, which is never loaded since it may run code; "
            f"use the safetensors repository instead ({HUB})"
        )
    return None


def _fastdeploy(found: _Signs) -> str | None:
    name, asked = found.tensor(end=(".quant_weight",)), found.quantization
    if name is None and asked.get("is_quantized") is False:
        return (
            f"config.json's quantization_config asks for FastDeploy's {asked.get('quantization')!r}; only wint8 and "
            "wint4 are done as weights load: change it, or remove it"
        )
    if name is None and "quantization" in asked:
        return f"config.json's quantization_config says that FastDeploy has quantised the weights; {_UNQUANTISED}"
    return name and f"tensor {name} was quantised by FastDeploy ahead of time, which is not read; {_UNQUANTISED}"


def _paddle(found: _Signs) -> str | None:
    name = found.tensor(start=("ernie.",), end=(".qkv_proj.weight", ".up_gate_proj.weight"))
    if name is not None:
        return f"tensor {name} is in {_PADDLE}"
    hidden = found.config.get("hidden_size")
    for name, shape in found.shapes.items():
        # PyTorch stores a projection as [out, in], Paddle as [in, out]; keys are narrower than the model.
        if name.endswith(".self_attn.k_proj.weight") and len(shape) == 2 and shape[0] == hidden != shape[1]:
            return f"tensor {name} has the shape {list(shape)}, transposed as in {_PADDLE}"
    return None


def _mlx(found: _Signs) -> str | None:
    name = found.tensor(start=("language_model.model.",), within=".switch_mlp.")
    if name is None and found.tensor(end=(".scales",)) and (biases := found.tensor(end=(".biases",))):
        name = biases
    return name and f"tensor {name} is in MLX's format, which is not read; {_UNQUANTISED}"


# By config.json's quant_method; compressed-tensors is also what llm-compressor's AWQ and GPTQ are saved as.
_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "auto-round": "AutoRound",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
}


def _quantised_by_config(found: _Signs) -> str | None:
    if not found.quantization:
        return None
    layout = stored_layout(found.quantization)
    if layout is not None:
        if asked := unusable(found.quantization):
            return f"config.json's quantization_config: {asked}; {_UNQUANTISED}"
        suffix = SUFFIXES[layout][0]
        if found.shapes and not found.tensor(end=(f".{suffix}",)):
            return (
                f"config.json's quantization_config says that weights are quantised by {layout}, and there is no "
                f"tensor *.{suffix}; remove the field if they are not"
            )
        return None
    method = found.quantization.get("quant_method")
    name = _METHODS.get(method, method) if isinstance(method, str) else "a method it does not name"
    return f"config.json's quantization_config says that the weights are quantised by {name}; {_UNQUANTISED}"


# In this order: AWQ and GPTQ share the name qweight.
_SUFFIXES = {
    ".weight_packed": "compressed-tensors",
    ".g_idx": "GPTQ",
    ".qweight": "AWQ",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "FP8",
    ".q_weight": "ExLlamaV2",
    ".trellis": "ExLlamaV3",
    ".weight_scale": "a method that config.json does not name",
}


def _quantised_by_name(found: _Signs) -> str | None:
    if stored_layout(found.quantization) is not None:
        return None
    for suffix, method in _SUFFIXES.items():
        if name := found.tensor(end=(suffix,)):
            return (
                f"tensor {name} belongs to weights that are quantised by {method}, which are not read; {_UNQUANTISED}"
            )
    return None


# The surest sign first: a file that cannot be read at all, then names that only one format has.
_FORMATS: tuple[Callable[[_Signs], str | None], ...] = (
    _unreadable,
    _git_lfs,
    _hub_cache,
    _adapter,
    _without_safetensors,
    _fastdeploy,
    _paddle,
    _mlx,
    _quantised_by_config,
    _quantised_by_name,
)
