"""`millrace quantize`: files from which a start has the numbers of quantising as it loads, and which others read."""

import errno
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import quantised_files  # noqa: F401 - makes transformers importable, which the library imports
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli.demo import Dtype, write_demo
from cli.main import main
from cli.quantize import PROJECTION, _save, write_quantised
from cli.whole_directory import UNFINISHED, whole_directory
from services.engine.__main__ import build
from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Quantized, dequantize, quantize
from services.engine.kernels.reference.moe import MoE
from services.engine.model.ernie import ErnieModel, Layer
from services.engine.model.integers import integers_of
from services.engine.model.split import Split
from services.engine.model.stored_form import DENSE, EXPERTS, quantization_config, stored_form
from services.engine.model.weights import load_model
from services.engine.settings import EngineSettings
from shared.errors import CheckpointError, ConfigError
from shared.model.checkpoint import INDEX, Checkpoint
from shared.model.config import load_model_config
from shared.model.config_file import Quantization
from shared.model.stored_integers import read_integers
from shared.model.stored_quantization import Scheme

BOTH = pytest.mark.parametrize("quantization", ["wint8", "wint4"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantize") / "demo"
    write_demo(directory)
    return directory


def quantised(model: Path, output: Path, quantization: Quantization) -> Path:
    assert main(["quantize", "--model", str(model), "--output", str(output), "--quantization", quantization]) == 0
    return output


def load(directory: Path, quantization: Quantization | None = None) -> ErnieModel:
    return load_model(Checkpoint(directory), load_model_config(directory), "cpu", quantization, Ops())


def weights_of(layer: Layer) -> list[Quantized]:
    mlp = layer.mlp
    blocks = (mlp.text, mlp.vision, mlp.shared) if isinstance(mlp, MoE) else (mlp,)
    weights = [weight for block in blocks for weight in (block.gate_up, block.down)]
    return [weight for weight in (layer.qkv, layer.out, *weights) if isinstance(weight, Quantized)]


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_start_has_the_numbers_of_quantising_as_it_loads(
    tmp_path: Path, quantization: Quantization, dtype: Dtype
) -> None:
    write_demo(tmp_path / "demo", dtype=dtype)
    at_start = load(tmp_path / "demo", quantization)
    stored = load(quantised(tmp_path / "demo", tmp_path / "q", quantization))
    count = 0
    for layer, other in zip(at_start.weights.layers, stored.weights.layers, strict=True):
        for weight, found in zip(weights_of(layer), weights_of(other), strict=True):
            assert weight.bits == found.bits
            if dtype == "float32":  # products of the two scales are rounded
                torch.testing.assert_close(dequantize(found), dequantize(weight), rtol=1e-6, atol=0)
            else:
                assert torch.equal(dequantize(found), dequantize(weight))
                assert found.subgroups == 0
            count += 1
    assert count == 4 + 3 * 8
    assert torch.equal(at_start.weights.embedding, stored.weights.embedding)


@BOTH
def test_the_directory(demo: Path, tmp_path: Path, quantization: Quantization) -> None:
    output = tmp_path / "somewhere" / "new"
    write_quantised(demo, output, quantization, torch.device("cpu"), file_bytes=300_000)
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) > 5
    assert set(json.loads((output / INDEX).read_bytes())["weight_map"].values()) == set(files)
    # Of one tensor more than the limit at most, the embedding.
    assert max((output / name).stat().st_size for name in files) < 300_000 + 2048 * 128 * 2 + 100_000
    kept = {path.name for path in demo.iterdir()} - {path.name for path in demo.glob("*.safetensors")}
    assert {path.name for path in output.iterdir()} == kept | set(files)
    same = kept - {INDEX, "config.json"}
    assert all((output / name).read_bytes() == (demo / name).read_bytes() for name in same)
    assert {path.name for path in output.parent.iterdir()} == {"new"}, "nothing is left over"
    read, written = (sum(path.stat().st_size for path in d.glob("*.safetensors")) for d in (demo, output))
    assert written < 0.8 * read
    assert load_model_config(output).stored == quantization


@pytest.mark.parametrize(("quantization", "dense", "experts"), [("wint4", 8, 4), ("wint8", 8, 8)])
def test_the_library_reads_them(demo: Path, quantization: Quantization, dense: int, experts: int) -> None:
    """By the groups of quantization_config that its matcher finds for the modules' names, ours and transformers'."""
    config = QuantizationConfig.model_validate(quantization_config(quantization))
    names = [match["module"] for match in map(PROJECTION.fullmatch, Checkpoint(demo).names()) if match]
    assert len(names) == 4 * 4 + 3 + 3 * 3 * 17
    for name in names:
        bits = experts if ".experts." in name else dense
        for spelt in (name, name.replace("model.layers", "model.language_model.layers")):
            schemes = [s for s in config.config_groups.values() if any(match_name(spelt, t) for t in s.targets)]
            assert [scheme.weights.num_bits for scheme in schemes] == [bits], spelt
            assert not any(match_name(spelt, ignored) for ignored in config.ignore or ())
    for ignored in ("lm_head", "model.layers.1.mlp.gate", "vision_model.blocks.0.mlp.fc1"):
        assert any(match_name(ignored, pattern) for pattern in config.ignore or ())
    for scheme in config.config_groups.values():
        weight = quantize((torch.randn(24, 640) * 0.02).bfloat16(), scheme.weights.num_bits)
        read = PackedQuantizationCompressor.decompress(stored_form(weight), scheme)["weight"]
        assert torch.equal(read.to(torch.bfloat16), dequantize(weight))


# Modules of vLLM 0.32 (which looks for joined projections by their parts) and of SGLang 0.5.23, as both ask for them.
THEIRS = {
    "experts": ("mlp.text_experts.0.gate_proj", "mlp.vision_experts.0.up_proj", "mlp.text_experts.0.down_proj"),
    "dense": (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        *("mlp.shared_experts.gate_proj", "mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj"),
    ),
    "ignored": ("mlp.text_experts_gate", "mlp.vision_experts_gate"),
}


@BOTH
def test_other_engines_find_the_group_of_their_modules(quantization: Quantization) -> None:
    """SGLang refuses a linear layer that no group has, and that is not ignored; vLLM takes it for unquantised."""
    config = QuantizationConfig.model_validate(quantization_config(quantization))
    assert [group.targets for group in config.config_groups.values()] == [[EXPERTS], list(DENSE)]
    groups = {"experts": [EXPERTS], "dense": list(DENSE), "ignored": config.ignore or []}
    for kind, modules in THEIRS.items():
        for name in (f"{prefix}model.layers.1.{module}" for prefix in ("", "language_model.") for module in modules):
            found = [of for of, patterns in groups.items() if any(match_name(name, pattern) for pattern in patterns)]
            assert found == [kind], name
    for name in (
        "lm_head",
        "vision_model.blocks.0.attn.qkv_proj",
        "vision_model.blocks.0.mlp.fc2",
        "resampler_model.mlp",
    ):
        assert any(match_name(name, pattern) for pattern in config.ignore or []), name


@pytest.mark.parametrize("dim", [0, 1])
def test_ranks_have_parts_of_the_whole_s_numbers(dim: int) -> None:
    weight = quantize((torch.randn(8, 512) * 0.02).bfloat16(), 4)
    stored = read_integers("compressed-tensors", [Scheme(4, 128, True)], "x", stored_form(weight), (8, 512))
    whole = integers_of(stored, torch.bfloat16, "x", own=True)
    parts = [dequantize(whole.part(Split(rank, 2), dim, "x").packed()) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim), dequantize(weight))


@pytest.mark.parametrize(
    ("schemes", "read"),
    [
        ([Scheme(4, 128, symmetric=False)], False),
        ([Scheme(4, 32, symmetric=False)], False),  # of these bits, where none has these groups
        ([Scheme(4, 128, symmetric=True), Scheme(4, 32, symmetric=False)], True),
        ([Scheme(4, 128, symmetric=False), Scheme(4, 32, symmetric=True)], False),
        ([Scheme(8, 0, symmetric=False)], True),
    ],
)
def test_zero_points_are_missing_where_the_closest_scheme_has_them(schemes: list[Scheme], read: bool) -> None:
    parts = stored_form(quantize((torch.randn(8, 512) * 0.02).bfloat16(), 4))
    if read:
        assert read_integers("compressed-tensors", schemes, "x", parts, (8, 512)).zero is None
        return
    with pytest.raises(CheckpointError, match=r"x\.weight_zero_point is missing"):
        read_integers("compressed-tensors", schemes, "x", parts, (8, 512))


def test_what_cannot_be_asked(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = quantised(demo, tmp_path / "done", "wint8")
    capsys.readouterr()
    for words, said in (
        (["--model", str(demo), "--output", str(done), "--quantization", "wint4"], "is there already"),
        (
            ["--model", str(done), "--output", str(tmp_path / "x"), "--quantization", "wint4"],
            "already (wint8)",
        ),
        (["--model", str(demo), "--output", str(tmp_path / "x"), "--quantization", "wint2"], "invalid choice"),
        (["--model", "/nowhere", "--output", str(tmp_path / "x"), "--quantization", "wint4"], "is not a directory"),
    ):
        assert main(["quantize", *words]) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done"]


@pytest.mark.parametrize("place", ["empty", "link", "dangling", "."])
def test_a_place_that_is_there_is_filled(
    demo: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("new")
    monkeypatch.chdir(tmp_path / "empty")
    inode = (tmp_path / "empty").stat().st_ino
    output = quantised(demo, Path(place) if place == "." else tmp_path / place, "wint8")
    assert load_model_config(output).stored == "wint8"
    assert (tmp_path / "empty").stat().st_ino == inode, "a mount point cannot be replaced"
    assert not (output / UNFINISHED).exists()
    assert {path.name for path in output.iterdir()} >= {"config.json", INDEX, "tokenizer_config.json"}


def test_what_a_killed_one_left_is_replaced(demo: Path, tmp_path: Path) -> None:
    left = tmp_path / "q" / UNFINISHED / "files" / "0.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    (tmp_path / "q" / UNFINISHED / "lock").touch()
    output = quantised(demo, tmp_path / "q", "wint8")
    assert not {path.name for path in output.iterdir()} & {UNFINISHED, "0.part"}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_where_nothing_can_be_made_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--output: .*No such file.*/proc/q"), whole_directory(Path("/proc/q"), "a"):
        pass


def test_nobody_else_writes_meanwhile(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "q", "a") as fresh:
        (fresh / "a").touch()
        with pytest.raises(ConfigError, match=r"another command is writing .*/q"), whole_directory(tmp_path / "q", "a"):
            pass
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["a"]


def test_the_last_file_is_not_there_before_the_others(tmp_path: Path) -> None:
    def write() -> None:
        with whole_directory(tmp_path, "a") as fresh:
            (fresh / "a").touch()
            (fresh / "z").touch()
            (tmp_path / "z" / "full").mkdir(parents=True)

    with pytest.raises(IsADirectoryError):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["z"]


def of_one_file(demo: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy the model, with its tensors changed and without an index."""
    shutil.copytree(demo, target)
    (target / INDEX).unlink()
    tensors: dict[str, Tensor] = {}
    for path in sorted(target.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


PROJ = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(PROJ), f"tensor {PROJ} is missing"),
        (lambda tensors: tensors.update({PROJ: tensors[PROJ].flatten()}), f"tensor {PROJ} .* has shape"),
        (lambda tensors: tensors.pop("vision_model.ln.weight"), r"tensor vision_model\.ln\.weight is missing"),
        (
            lambda tensors: tensors[PROJ][0].fill_(torch.inf),
            f"tensor {PROJ} has values that are not finite in bfloat16",
        ),
        (lambda tensors: tensors["model.norm.weight"].fill_(torch.nan), r"tensor model\.norm\.weight has values"),
    ],
)
def test_a_model_that_would_not_load_is_not_quantised(
    demo: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    model = of_one_file(demo, tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=said):
        write_quantised(model, tmp_path / "q", "wint4", torch.device("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_told_as_elsewhere(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("cli.quantize.save_file", full)
    words = ["--model", str(demo), "--output", str(tmp_path / "q"), "--quantization", "wint4"]
    assert main(["quantize", *words]) == 2
    assert "the disk has no room for" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_library_s_error_of_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """By the limit of a file's size, since disks are not full on request."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            _save({"x": torch.zeros(100_000)}, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_scales_of_somebody_else_in_a_file_of_ours_are_an_error(demo: Path, tmp_path: Path) -> None:
    output = quantised(demo, tmp_path / "q", "wint4")
    (path,) = output.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale"] *= 1.0001
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight: .* quantise it again"):
        load(output)


def test_another_quantization_than_the_files_is_refused(demo: Path, tmp_path: Path) -> None:
    output = quantised(demo, tmp_path / "q", "wint4")
    settings = EngineSettings(redis_url="unix:///unused", model=str(output), quantization="wint8", device="cpu")
    with pytest.raises(ConfigError, match=r"quantization is wint8, .* quantised already \(wint4\)"):
        build(settings, None)  # type: ignore[arg-type]
