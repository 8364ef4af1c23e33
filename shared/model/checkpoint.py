"""Reader of sharded safetensors by the hub's names, whichever the files use. The only part of `shared` with torch.

Files may have the hub's original names, with or without the `model.` prefix on the vision tower, or transformers' own
(fused experts, transposed gates). Callers use the original names of docs/checkpoint.md.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import CheckpointError
from shared.model.config_file import read_object
from shared.model.foreign_checkpoints import refuse_foreign
from shared.model.stored_integers import StoredIntegers, read_integers
from shared.model.stored_quantization import SUFFIXES, schemes_of, stored_layout, stored_schemes

DTYPES = {"BF16", "F16", "F32", "F64"}
_TORCH_DTYPES = {
    "I32": torch.int32,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
INDEX, SINGLE, SHARDS = "model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors"


@dataclass(frozen=True, slots=True)
class _Part:
    """Stored tensor, or a slice of one."""

    stored: str
    index: tuple[int | slice, ...] = ()


@dataclass(frozen=True, slots=True)
class _Source:
    """Recipe of an original tensor: the rows of stored ones, concatenated, and perhaps transposed."""

    parts: tuple[_Part, ...]
    transposed: bool = False


class Checkpoint:
    """Opened model directory. Tensors are read one at a time, memory-mapped; nothing is unpickled."""

    def __init__(self, directory: Path, *, headers_only: bool = False) -> None:
        """Open the shards and match their tensors to the original names.

        Args:
            headers_only: return checked tensors without values, on torch's meta device.

        Raises:
            CheckpointError: no safetensors, an index that names absent files, the same tensor twice, or another
                format.
        """
        refuse_foreign(directory)
        self._directory = directory
        self._headers_only = headers_only
        self._files = _Files(directory)
        self._sources = _sources(self._files)
        asked = (read_object(directory / "config.json") or {}).get("quantization_config")
        self._layout = stored_layout(asked) if isinstance(asked, dict) else None
        self._schemes = stored_schemes(asked) if isinstance(asked, dict) else []
        self._asked: set[str] = set()
        self.warnings = tuple(f"{directory}: {text}" for text in _remarks(self._files))

    def get(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Return one tensor by its original name, on the CPU, in its stored dtype.

        Raises:
            CheckpointError: it is missing, has another shape, or is not of floating point.
        """
        source = self._sources.get(name)
        if source is None and self._is_integers(name):
            raise CheckpointError(
                f"{self._directory}: tensor {name} is stored quantised; this one is read in floating point only"
            )
        if source is None:
            raise CheckpointError(f"{self._directory}: tensor {name} is missing")
        self._asked.add(name)
        self._check(name, source, tuple(shape))
        if self._headers_only:
            return torch.empty(tuple(shape), device="meta")
        parts = [self._files.read(part) for part in source.parts]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tensor.T if source.transposed else tensor

    def integers(self, name: str, shape: tuple[int, int], device: torch.device) -> StoredIntegers | None:
        """Return a weight that is stored quantised, unpacked on `device`; None if it is stored in floating point.

        Args:
            name: original name of the weight in floating point.

        Raises:
            CheckpointError: it does not have the shape, or is not quantised in a way that is read.
        """
        if self._layout is None or not self._is_integers(name):
            return None
        module, (integers, others) = name.removesuffix(".weight"), SUFFIXES[self._layout]
        stored = {part: f"{module}.{part}" for part in (integers, *others) if f"{module}.{part}" in self._sources}
        self._asked.update(stored.values())
        parts = {part: self._part(self._sources[full].parts[0]) for part, full in stored.items()}
        # Its numbers are compared here: of a GPU, each comparison would be waited for.
        parts = {part: tensor if part == "weight_shape" else tensor.to(device) for part, tensor in parts.items()}
        on_disk = self._sources[stored[integers]].parts[0].stored.removesuffix(f".{integers}")
        try:
            return read_integers(self._layout, schemes_of(self._schemes, on_disk), module, parts, shape)
        except CheckpointError as error:
            raise CheckpointError(f"{self._directory}: {error}") from error

    def scale_dtypes(self) -> set[str]:
        """Return the dtypes in which the scales of stored integers are stored."""
        ends = (".weight_scale", ".scales")
        names = (source.parts[0].stored for name, source in self._sources.items() if name.endswith(ends))
        return {self._files.dtype(stored) for stored in names}

    def _is_integers(self, name: str) -> bool:
        return (
            self._layout is not None and f"{name.removesuffix('.weight')}.{SUFFIXES[self._layout][0]}" in self._sources
        )

    def _part(self, part: _Part) -> torch.Tensor:
        """Return a stored tensor as it is, without values where headers are all that is read."""
        if not self._headers_only:
            return self._files.read(part)
        dtype = _TORCH_DTYPES.get(self._files.dtype(part.stored), torch.uint8)
        return torch.empty(self._files.part_shape(part), dtype=dtype, device="meta")

    def _check(self, name: str, source: _Source, shape: tuple[int, ...]) -> None:
        """Compare shape and dtype in the headers with those that the caller expects."""
        found = self.shape(name)
        dtypes = {self._files.dtype(part.stored) for part in source.parts} - DTYPES
        if found == shape and not dtypes:
            return
        stored = ", ".join(part.stored for part in source.parts)
        wrong = f"has shape {list(found)}, not {list(shape)}"
        if dtypes:
            wrong = f"is stored as {', '.join(sorted(dtypes))}; only {', '.join(sorted(DTYPES))} are read"
        raise CheckpointError(f"{self._directory}: tensor {name} (stored as {stored}) {wrong}")

    def has(self, name: str) -> bool:
        """Return True if a tensor of this original name is stored."""
        return name in self._sources

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its original name, which is stored."""
        source = self._sources[name]
        found = _joined([self._files.part_shape(part) for part in source.parts])
        return found[::-1] if source.transposed else found

    def check_all_used(self, prefixes: Sequence[str]) -> None:
        """Check that all tensors below `prefixes` have been read.

        Raises:
            CheckpointError: a tensor whose original name starts with one of `prefixes` was never read.
        """
        unused = sorted(name for name in self._sources if name.startswith(tuple(prefixes)) and name not in self._asked)
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise CheckpointError(f"{self._directory}: unexpected tensors {', '.join(unused[:3])}{more}")

    def names(self) -> Iterator[str]:
        """Return the original names of all tensors."""
        return iter(self._sources)


# ----------------------------------------------------------------------------------------------------- files on disk


class _Files:
    """Shards: index of their tensors, and reader."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        listed = _weight_map(directory / INDEX)
        # Without an index the shards' own headers say what is where; a shard that is not there leaves tensors missing.
        self.without_index = (
            [] if listed or (directory / SINGLE).exists() else sorted(path.name for path in directory.glob(SHARDS))
        )
        for name in sorted(set(listed.values())) or self.without_index or [SINGLE]:
            self._open(name)
        if listed:
            self._check_index(listed)

    def names(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, stored: str) -> tuple[int, ...]:
        return tuple(self._handles[self._file_of[stored]].get_slice(stored).get_shape())

    def dtype(self, stored: str) -> str:
        return str(self._handles[self._file_of[stored]].get_slice(stored).get_dtype())

    def part_shape(self, part: _Part) -> tuple[int, ...]:
        shape = self.shape(part.stored)
        sliced = [len(range(n)[i]) for n, i in zip(shape, part.index, strict=False) if isinstance(i, slice)]
        return (*sliced, *shape[len(part.index) :])

    def read(self, part: _Part) -> torch.Tensor:
        handle = self._handles[self._file_of[part.stored]]
        tensor: torch.Tensor
        tensor = handle.get_slice(part.stored)[part.index] if part.index else handle.get_tensor(part.stored)
        return tensor

    def _open(self, name: str) -> None:
        path = self._directory / name
        if path.parent != self._directory:
            raise CheckpointError(f"{self._directory / INDEX} names {name!r}, which is no file of the directory")
        try:
            handle: Any = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist") from error
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that no file can have
            raise CheckpointError(f"{path} is no complete safetensors file: {error}") from error
        self._handles[name] = handle
        for stored in handle.keys():  # noqa: SIM118 - not a mapping
            if stored in self._file_of:
                raise CheckpointError(f"tensor {stored} is in {self._file_of[stored]} and in {name}")
            self._file_of[stored] = name

    def _check_index(self, listed: dict[str, str]) -> None:
        for stored in sorted(listed.keys() | self._file_of.keys()):
            says, found = listed.get(stored), self._file_of.get(stored)
            if says != found:
                raise CheckpointError(
                    f"{self._directory / INDEX} puts tensor {stored} in {says or 'no file'}; "
                    f"it is in {found or 'no file'}"
                )


def _weight_map(path: Path) -> dict[str, str]:
    """Return {tensor name: file name} of the index; empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files")
    return weight_map


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of tensors concatenated along their rows."""
    first, *rest = shapes
    return (first[0] + sum(shape[0] for shape in rest), *first[1:]) if rest else first


# ------------------------------------------------------------------------------------------------------ names on disk

# transformers' own naming, below the layer's `mlp.`. Pool 0 is text, pool 1 vision.
_POOL = r"(?P<mlp>.+\.mlp\.)(?P<pool>text|vision)_moe\."
_NATIVE_GATE = re.compile(_POOL + r"gate\.weight")
_NATIVE_BIAS = re.compile(_POOL + r"gate\.moe_statics\.e_score_correction_bias")
_NATIVE_EXPERTS = re.compile(_POOL + r"experts\.(?P<kind>gate_up|down)_proj")
# One expert at a time, as quantised checkpoints of transformers' model have them.
_NATIVE_EXPERT = re.compile(
    r"(?P<mlp>\.mlp\.)(?P<pool>text|vision)_moe\.(?P<experts>experts\.)(?P<expert>[0-9]{1,6})(?=\.)"
)
_NATIVE_RESAMPLER = re.compile(r"(?P<linear>.*resampler_model\.\w+_linear\.)(?P<part>fc1|fc2|ln)(?P<rest>\..+)")
# Buffers that some savers store, the layers that predict several tokens at once (MTP), which are not run, and scales of
# a cache that is kept quantised elsewhere.
_IGNORED = re.compile(
    r"(?:.+\.)?(?:(?P<rotary>inv_freq)|(?P<mtp>mtp(?:_\w+)?)\..+|self_attn\.(?P<cache>[kv]_(?:scale|zero_point)))"
)
_WHY_IGNORED = {
    "rotary": "named inv_freq; rotary frequencies are computed",
    "mtp": "of multi-token prediction (mtp); one token is predicted at a time",
    "cache": "of a quantised cache; keys and values are kept in the model's dtype",
}
_RESAMPLER_PARTS = {"fc1": "0", "fc2": "2", "ln": "3"}


def _sources(files: _Files) -> dict[str, _Source]:
    """Return the source of each original tensor, by name."""
    sources: dict[str, _Source] = {}
    halves: dict[str, dict[int, _Part]] = {}
    experts = 1 + max((int(m["expert"]) for m in map(_NATIVE_EXPERT.search, files.names()) if m), default=-1)
    for stored in files.names():
        if _IGNORED.fullmatch(stored):
            continue
        name = _original_expert(_original_prefix(stored), experts)
        if match := _NATIVE_BIAS.fullmatch(name):
            bias = f"{match['mlp']}moe_statics.e_score_correction_bias"
            halves.setdefault(bias, {})[_pool(match)] = _Part(stored)
            continue
        for original, source in _expand(name, stored, files):
            if original in sources:
                first = sources[original].parts[0].stored
                raise CheckpointError(f"tensor {original} is stored twice: as {first} and as {stored}")
            sources[original] = source
    for bias, parts in halves.items():
        if len(parts) != 2:
            raise CheckpointError(
                f"tensor {bias} is stored for one of the two pools only, as {parts.popitem()[1].stored}"
            )
        if bias in sources:
            raise CheckpointError(f"tensor {bias} is stored twice: as {bias} and as {parts[0].stored}")
        sources[bias] = _Source((parts[0], parts[1]))
    return sources


def _remarks(files: _Files) -> Iterator[str]:
    """Yield a line for a missing index, and for each kind of stored tensor that the model does not use."""
    if files.without_index:
        yield f"there is no {INDEX}; the {len(files.without_index)} shards are read without it"
    found = Counter(match.lastgroup for match in map(_IGNORED.fullmatch, files.names()) if match)
    for kind, why in _WHY_IGNORED.items():
        if found[kind]:
            yield f"tensors ignored: {found[kind]} {why}"


def _original_prefix(stored: str) -> str:
    """Return the original name: that of the tower is at the root, all others are under `model.`."""
    name = stored.removeprefix("model.").removeprefix("language_model.")
    if name.startswith("vision_tower."):
        name = "vision_model." + name.removeprefix("vision_tower.")
    return name if name.startswith(("vision_model.", "lm_head.")) else f"model.{name}"


def _original_expert(name: str, count: int) -> str:
    """Return the original name of what belongs to one expert: the vision pool's follow the `count` of text."""
    return _NATIVE_EXPERT.sub(lambda m: f"{m['mlp']}{m['experts']}{int(m['expert']) + _pool(m) * count}", name)


def _pool(match: re.Match[str]) -> int:
    return 0 if match["pool"] == "text" else 1


def _expand(name: str, stored: str, files: _Files) -> Iterator[tuple[str, _Source]]:
    """Yield the original tensors in a stored one: itself, or in transformers' naming up to two per expert."""
    if match := _NATIVE_EXPERTS.fullmatch(name):
        yield from _fused_experts(match, stored, files.shape(stored))
    elif match := _NATIVE_GATE.fullmatch(name):
        yield f"{match['mlp']}gate.weight{'_1' if _pool(match) else ''}", _Source((_Part(stored),), transposed=True)
    elif match := _NATIVE_RESAMPLER.fullmatch(name):
        yield f"{match['linear']}{_RESAMPLER_PARTS[match['part']]}{match['rest']}", _Source((_Part(stored),))
    else:
        yield name, _Source((_Part(stored),))


def _fused_experts(match: re.Match[str], stored: str, shape: tuple[int, ...]) -> Iterator[tuple[str, _Source]]:
    """Yield the experts' tensors in a fused one.

    gate_up_proj is [experts, 2 x inner, hidden], gate rows first; down_proj is [experts, hidden, inner].
    """
    gate_up = match["kind"] == "gate_up"
    if len(shape) != 3 or (gate_up and shape[1] % 2):
        raise CheckpointError(f"tensor {stored} has shape {list(shape)}, not that of fused experts")
    count, rows, _ = shape
    for e in range(count):
        expert = f"{match['mlp']}experts.{e + _pool(match) * count}."
        if gate_up:
            yield f"{expert}gate_proj.weight", _Source((_Part(stored, (e, slice(0, rows // 2))),))
            yield f"{expert}up_proj.weight", _Source((_Part(stored, (e, slice(rows // 2, rows))),))
        else:
            yield f"{expert}down_proj.weight", _Source((_Part(stored, (e,)),))
