"""Command `millrace quantize`: write a model directory with weights quantised, as `--quantization` would at each start.

A start from it reads a quarter to a half of the bytes. Weights are read, quantised and written one at a time, so that
little more than one file's tensors are in memory.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cli.check import GIB
from cli.connection import Parser
from cli.demo_tokenizer import write_json
from cli.whole_directory import refuse_used, whole_directory
from services.engine.kernels.quantize import Bits, Quantized, quantize
from services.engine.model.stored_form import quantization_config, stored_form
from services.engine.model.weights import dtype_of, widths
from services.engine.run.footprint import decoder_shapes
from services.mm_encoder.vision.weights import load_weights as load_vision
from shared.errors import CheckpointError, ConfigError
from shared.model.checkpoint import INDEX, Checkpoint
from shared.model.config import load_model_config
from shared.model.config_file import Quantization

FILE_BYTES = 2 * GIB  # of a file's tensors, but for the last one
PROJECTION = re.compile(r"(?P<module>model\.layers\.\d+\.(?:self_attn|mlp)\.(?P<expert>experts\.)?.*_proj)\.weight")
# Not copied: weights, what the index says of them, and other forms of them.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".pdparams")

Quantize = Callable[[Tensor, Bits], Quantized]


def main(words: Sequence[str]) -> int:
    """Run the command and return the exit status.

    Raises:
        ConfigError: a flag is wrong, the output is there already, or the weights are quantised already.
        CheckpointError: the model directory is incomplete or malformed, or a weight is not finite.
        OSError: the output cannot be written.
    """
    given = _parser().parse_args(words)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    write_quantised(given.model, given.output, given.quantization, device)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="millrace quantize", description="Write a model directory with quantised weights.", allow_abbrev=False
    )
    parser.add_argument("--model", type=_directory, required=True, metavar="DIR", help="the checkpoint, not quantised")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_argument("--quantization", choices=("wint4", "wint8"), required=True, help="as of serve")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where to compute (a GPU, if there is one)")
    return parser


def _directory(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is not a directory (models are read from disk, never downloaded)")
    return Path(text)


def write_quantised(
    model: Path, output: Path, quantization: Quantization, device: torch.device, file_bytes: int = FILE_BYTES
) -> None:
    """Write the directory; it has no config.json until all else is there.

    Raises:
        ConfigError, CheckpointError, OSError: as `main`.
    """
    refuse_used(output)
    config = load_model_config(model)
    if config.stored is not None:
        raise ConfigError(f"--model: the weights of {model} are quantised already ({config.stored})")
    headers = Checkpoint(model, headers_only=True)
    decoder_shapes(headers, config)
    load_vision(headers, config, "meta")
    with whole_directory(output, last="config.json") as fresh:
        files = _write_files(fresh, _tensors(model, quantization, device), file_bytes)
        _copy_others(model, fresh)
        written = json.loads((model / "config.json").read_bytes())
        write_json(fresh / "config.json", written | {"quantization_config": quantization_config(quantization)})
    print(f"{output}: {quantization}, {sum(files) / GIB:.2f} GiB in {len(files)} files")


def _tensors(model: Path, quantization: Quantization, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors by their original names; those of projections quantised as the engine does it."""
    checkpoint, dtype = Checkpoint(model), dtype_of(load_model_config(model))
    dense_bits, expert_bits = widths(quantization)
    compute = _quantize(device)
    for name in sorted(checkpoint.names()):
        tensor = checkpoint.get(name, checkpoint.shape(name))
        match = PROJECTION.fullmatch(name)
        bits = None if match is None else expert_bits if match["expert"] else dense_bits
        if match is None or bits is None:
            yield name, _finite(name, tensor.contiguous())
            continue
        weight = compute(_finite(name, tensor.to(device, dtype).contiguous()), bits)
        yield from ((f"{match['module']}.{part}", stored.cpu()) for part, stored in stored_form(weight).items())


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"tensor {name} has values that are not finite in {str(tensor.dtype).removeprefix('torch.')}"
        )
    return tensor


def _quantize(device: torch.device) -> Quantize:
    if device.type == "cpu":
        return quantize
    from services.engine.kernels.triton.dense.quantize import quantize as on_gpu

    return on_gpu


def _write_files(directory: Path, tensors: Iterator[tuple[str, Tensor]], file_bytes: int) -> list[int]:
    """Write tensors to files of about a size, and the index; return the bytes of each file."""
    files: list[dict[str, int]] = []
    for some in _batches(tensors, file_bytes):
        _save(some, directory / f"{len(files)}.part")
        files.append({name: tensor.nbytes for name, tensor in some.items()})
    weight_map: dict[str, str] = {}
    for number, sizes in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (directory / f"{number}.part").rename(directory / file)
        (directory / file).chmod(0o644)
        weight_map |= dict.fromkeys(sizes, file)
    totals = [sum(sizes.values()) for sizes in files]
    write_json(directory / INDEX, {"metadata": {"total_size": sum(totals)}, "weight_map": weight_map})
    return totals


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """
    Raises:
        OSError: the disk is full, or the like, of which the library has an error of its own.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (match := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error


def _batches(tensors: Iterator[tuple[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield tensors, a file's at a time; no more are held."""
    some: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        some[name] = tensor
        held += tensor.nbytes
        if held >= size:
            yield some
            some, held = {}, 0
    if some:
        yield some


def _copy_others(model: Path, fresh: Path) -> None:
    """Copy the tokenizer, the templates and whatever else is beside the weights."""
    for path in sorted(model.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name != "config.json":
            shutil.copyfile(path, fresh / path.name)
