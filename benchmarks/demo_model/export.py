"""Writes what training has saved as a checkpoint: python -m benchmarks.demo_model.export STATE TOKENIZER DIRECTORY.

`--dtype float32` writes the same weights, rounded to bfloat16 all the same, in float32: what the arithmetic costs.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.demo_model.config import hub_config
from benchmarks.demo_model.model import Model, build
from benchmarks.demo_model.train import load_weights
from cli import demo
from cli.demo_tokenizer import write_json

TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def export(state: Path, tokenizer: Path, directory: Path, dtype: str = "bfloat16") -> None:
    """Write the checkpoint in the hub's form."""
    directory.mkdir(parents=True, exist_ok=True)
    model = build(hub_config(), seed=0)
    saved: dict[str, Tensor] = {}
    for file in sorted(state.glob("state-*.safetensors")):
        saved |= load_file(file)
    load_weights(model, saved)
    tensors = {name: _round(name, tensor, dtype) for name, tensor in hub_tensors(model).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    write_json(directory / "config.json", hub_config() | {"torch_dtype": dtype})
    # Greedy unless the client says otherwise: so small a model draws a wrong word often enough.
    write_json(
        directory / "generation_config.json", demo._generation_config() | {"do_sample": False, "temperature": 0.0}
    )
    write_json(directory / "preprocessor_config.json", demo._preprocessor_config())
    for name in TOKENIZER:
        shutil.copyfile(tokenizer / name, directory / name)


def hub_tensors(model: Model) -> dict[str, Tensor]:
    """The tensors under their names on the hub, as transformers' own saving gives them."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tensors = load_file(Path(scratch, "model.safetensors"))
    return {name.replace("model.vision_model.", "vision_model."): tensor for name, tensor in tensors.items()}


def _round(name: str, tensor: Tensor, dtype: str) -> Tensor:
    if any(part in name for part in ("mlp.gate.weight", "moe_statics")):
        return tensor.float()
    return tensor.to(torch.bfloat16).to(getattr(torch, dtype))


def main(arguments: list[str]) -> None:
    """Export."""
    parser = argparse.ArgumentParser()
    for name in ("state", "tokenizer", "directory"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args(arguments)
    export(options.state, options.tokenizer, options.directory, options.dtype)


if __name__ == "__main__":
    main(sys.argv[1:])
