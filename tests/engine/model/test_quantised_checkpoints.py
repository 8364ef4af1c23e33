"""Checkpoints that are quantised already, as their own libraries write them: the numbers of the dequantised weights."""

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_driver import Driver, Paged
from quantised_files import Quantise, awq, gptq, with_library, write_quantised
from rank_threads import on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Quantized
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.reference.parallel import parallel_ops
from services.engine.model.ernie import ErnieModel
from services.engine.model.integers import Integers
from services.engine.model.split import WHOLE, Split
from services.engine.model.weights import load_model
from services.engine.run.footprint import decoder_shapes, weight_bytes
from shared.errors import CheckpointError
from shared.model.checkpoint import Checkpoint
from shared.model.config import load_model_config

IDS = [5, 6, 7, 210, 33, 1, 220, 2, 64, 12, 9]
FORMS: dict[str, Callable[[], tuple[Quantise, dict[str, Any]]]] = {
    "int4 g32": lambda: with_library(num_bits=4, strategy="group", group_size=32, symmetric=True),
    "int4 g32 zero points": lambda: with_library(num_bits=4, strategy="group", group_size=32, symmetric=False),
    "int4 channel": lambda: with_library(num_bits=4, strategy="channel", symmetric=True),
    "int4 channel zero points": lambda: with_library(num_bits=4, strategy="channel", symmetric=False),
    "int8 channel": lambda: with_library(num_bits=8, strategy="channel", symmetric=True),
    "int8 g32": lambda: with_library(num_bits=8, strategy="group", group_size=32, symmetric=True),
    "int8 g32 zero points": lambda: with_library(num_bits=8, strategy="group", group_size=32, symmetric=False),
    "int8 channel zero points": lambda: with_library(num_bits=8, strategy="channel", symmetric=False),
    "AWQ": lambda: awq(32),
    "GPTQ": lambda: gptq(32, symmetric=False),
    "GPTQ symmetric": lambda: gptq(32, symmetric=True),
    "GPTQ of version 2": lambda: gptq(32, symmetric=False, version=2),
}


def load(directory: Path, split: Split = WHOLE, ops: Ops | None = None) -> ErnieModel:
    return load_model(Checkpoint(directory), load_model_config(directory), "cpu", None, ops or Ops(), split)


def logits(model: ErnieModel) -> Tensor:
    positions = torch.arange(len(IDS)).expand(3, -1)
    hidden = model.config.hidden_size
    found: Tensor = Driver(model).run(Paged(IDS, positions, {at: torch.full((hidden,), 0.1 * at) for at in (3, 6)}), 3)
    return found


def held(part: object) -> dict[int, int]:
    """Return the bytes of each tensor in a structure, by where its memory begins."""
    if isinstance(part, Tensor):
        return {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()}
    if is_dataclass(part):
        part = tuple(getattr(part, field.name) for field in fields(part))
    parts = part if isinstance(part, tuple) else ()
    return {place: size for each in parts for place, size in held(each).items()}


@pytest.fixture
def written(checkpoint_dir: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    return lambda form: write_quantised(checkpoint_dir, tmp_path, *FORMS[form]())


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_dequantised_weights(
    written: Callable[[str], tuple[Path, Path]], checkpoint_dir: Path, form: str
) -> None:
    quantised, dequantised = written(form)
    model = load(quantised)
    bits = 8 if "int8" in form else 4
    for layer in model.weights.layers:
        weights = [layer.qkv, layer.out]
        weights += [layer.mlp.text.gate_up, layer.mlp.vision.down] if isinstance(layer.mlp, MoE) else [layer.mlp.down]
        assert all(isinstance(weight, Quantized) and weight.bits == bits for weight in weights)
    # What headers foretell, for `millrace check` and `plan`.
    foretold = weight_bytes(decoder_shapes(Checkpoint(quantised, headers_only=True), model.config), None)
    assert sum(held(model.weights).values()) == foretold
    actual = logits(model)
    assert torch.equal(actual, logits(load(dequantised)))
    assert not torch.allclose(actual, logits(load(checkpoint_dir)), rtol=0, atol=1e-2)


def test_experts_by_the_names_of_transformers(written: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    quantised, _ = written("int4 g32")
    expected = logits(load(quantised))
    count = load_model_config(quantised).num_experts
    path, renamed = quantised / "model.safetensors", {}
    for name, tensor in load_file(path).items():
        before, experts, rest = name.partition(".mlp.experts.")
        if experts:
            number, _, part = rest.partition(".")
            pool = "vision" if int(number) >= count else "text"
            name = f"{before}.mlp.{pool}_moe.experts.{int(number) % count}.{part}"
        renamed[name.replace("model.layers", "model.language_model.layers")] = tensor
    assert any("vision_moe.experts.0." in name for name in renamed)
    save_file(renamed, path)
    assert torch.equal(logits(load(quantised)), expected)


@pytest.mark.parametrize(("form", "size"), [("int4 channel zero points", 2), ("int8 channel", 2), ("AWQ", 2)])
def test_ranks_compute_much_the_same(written: Callable[[str], tuple[Path, Path]], form: str, size: int) -> None:
    quantised, _ = written(form)
    expected = logits(load(quantised))

    def work(rank: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        return logits(load(quantised, Split(rank, size), parallel_ops(gather)))

    for found in on_ranks(size, work)[0]:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_group_that_ranks_would_divide_is_named() -> None:
    weight = Integers(torch.zeros(2, 192, dtype=torch.int8), torch.ones(2, 3), None, None, 4, 64)
    assert weight.part(Split(1, 3), 1, "x").scale.shape == (2, 1)
    with pytest.raises(CheckpointError, match=r"x has scales for groups of 64 inputs, .* the 96 inputs .* 2 ranks"):
        weight.part(Split(0, 2), 1, "x")


def changed(quantised: Path, suffix: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change the first tensor with this suffix, or leave it out."""
    path = quantised / "model.safetensors"
    tensors = load_file(path)
    name = min(name for name in tensors if name.endswith(suffix))
    tensor = change(tensors.pop(name))
    save_file(tensors if tensor is None else tensors | {name: tensor}, path)


@pytest.mark.parametrize(
    ("form", "suffix", "change", "said"),
    [
        ("int4 g32", "weight_packed", lambda t: t[:, 1:].contiguous(), r"weight_packed has shape .* in 4 or 8 bits"),
        ("int4 g32", "weight_scale", lambda t: t[:, :3].contiguous(), r"weight_scale has \[\d+, 3\] scales"),
        ("int4 g32", "weight_scale", lambda _: None, r"weight_scale is missing"),
        ("int4 g32", "q_proj.weight_packed", lambda _: None, r"q_proj\.weight is missing"),
        ("int4 g32 zero points", "weight_zero_point", lambda t: t[:, 1:].contiguous(), "weight_zero_point has shape"),
        ("int4 g32 zero points", "weight_zero_point", lambda _: None, r"weight_zero_point is missing: .*symmetric"),
        ("int8 channel zero points", "weight_zero_point", lambda _: None, r"weight_zero_point is missing: .*symmetric"),
        ("int4 g32", "weight_shape", lambda t: t + 8, r"weight_shape is \[\d+, \d+\]; the model's weight is"),
        ("int4 g32", "weight_shape", lambda _: torch.zeros(3, 3), r"weight_shape has shape \[3, 3\]"),
        ("GPTQ", "g_idx", lambda t: t.flip(0).contiguous(), r"g_idx puts inputs into groups .*desc_act"),
        ("GPTQ", "g_idx", lambda t: t[:3].contiguous(), r"g_idx has shape \[3\] .*, not \[\d+\] of torch.int32"),
        ("GPTQ", "g_idx", lambda t: t.float(), r"g_idx has .* dtype float32"),
        ("AWQ", "qzeros", lambda _: None, "qzeros is missing"),
    ],
)
def test_what_is_not_as_it_should_be_is_named(
    written: Callable[[str], tuple[Path, Path]],
    form: str,
    suffix: str,
    change: Callable[[Tensor], Tensor | None],
    said: str,
) -> None:
    quantised, _ = written(form)
    changed(quantised, suffix, change)
    with pytest.raises(CheckpointError, match=said):
        load(quantised)


def test_one_projection_in_floating_point_among_quantised_ones_is_named(
    written: Callable[[str], tuple[Path, Path]],
) -> None:
    quantised, dequantised = written("int4 g32")
    name = "model.layers.0.self_attn.k_proj"
    tensors = {n: t for n, t in load_file(quantised / "model.safetensors").items() if not n.startswith(name)}
    plain = load_file(dequantised / "model.safetensors")[f"{name}.weight"]
    save_file(tensors | {f"{name}.weight": plain}, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.*k_proj.*, which are multiplied as one, only some"):
        load(quantised)


def test_a_quantised_head_is_named(written: Callable[[str], tuple[Path, Path]]) -> None:
    quantised, _ = written("int4 g32")
    tensors = load_file(quantised / "model.safetensors")
    tensors["model.norm.weight_packed"] = tensors.pop("model.norm.weight")
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored quantised"):
        load(quantised)


def test_bfloat16_rounds_once(written: Callable[[str], tuple[Path, Path]]) -> None:
    """Scales of float16 become bfloat16, as other engines do; those of bfloat16 stay what they are."""
    quantised, _ = written("AWQ")
    config = json.loads((quantised / "config.json").read_bytes())
    (quantised / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}))
    model = load(quantised)
    out = model.weights.layers[0].out
    assert isinstance(out, Quantized)
    assert out.scale.dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()
