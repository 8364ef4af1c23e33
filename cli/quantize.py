"""Command `millrace quantize`: write a model directory with weights quantised, as `--quantization` would at each start.

A start from it reads a quarter to a half of the bytes. Weights are read, quantised and written one at a time, so that
little more than one file's tensors are in memory.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cli.check import GIB
from cli.connection import Parser
from cli.demo_tokenizer import write_json
from services.engine.kernels.quantize import Bits, Quantized, quantize
from services.engine.model.stored_form import quantization_config, stored_form
from services.engine.model.weights import dtype_of, widths
from shared.errors import ConfigError
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
        CheckpointError: the model directory is incomplete or malformed.
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
    """Write the directory, atomically: until all of it is there, it has another name.

    Raises:
        ConfigError, CheckpointError: as `main`.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} is there already; name a directory that is not")
    if (stored := load_model_config(model).stored) is not None:
        raise ConfigError(f"--model: the weights of {model} are quantised already ({stored})")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir(mode=0o755)
        files = _write_files(fresh, _tensors(model, quantization, device), file_bytes)
        _copy_others(model, fresh)
        config = json.loads((model / "config.json").read_bytes())
        write_json(fresh / "config.json", config | {"quantization_config": quantization_config(quantization)})
        fresh.replace(output)
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
            yield name, tensor.contiguous()
            continue
        weight = compute(tensor.to(device, dtype).contiguous(), bits)
        yield from ((f"{match['module']}.{part}", stored.cpu()) for part, stored in stored_form(weight).items())


def _quantize(device: torch.device) -> Quantize:
    if device.type == "cpu":
        return quantize
    from services.engine.kernels.triton.dense.quantize import quantize as on_gpu

    return on_gpu


def _write_files(directory: Path, tensors: Iterator[tuple[str, Tensor]], file_bytes: int) -> list[int]:
    """Write tensors to files of about a size, and the index; return the bytes of each file."""
    files: list[dict[str, int]] = []
    for some in _batches(tensors, file_bytes):
        save_file(some, directory / f"{len(files)}.part", metadata={"format": "pt"})
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
