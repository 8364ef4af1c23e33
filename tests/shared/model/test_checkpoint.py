"""The checkpoint reader: every naming gives the same tensors, and every bad file is an error that names it."""

import json
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.demo import write_demo
from shared.errors import CheckpointError
from shared.model.checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    write_demo(tmp_path / "demo")
    return tmp_path / "demo"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, oracle.Model]:
    directory = tmp_path_factory.mktemp("saved") / "model"
    return directory, oracle.save_with_transformers(directory)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory under the name on disk, by safetensors' own loader."""
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def single(directory: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint(directory)


def assert_same(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        got = checkpoint.get(name, tensor.shape)
        assert got.dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name


def test_the_hubs_own_names(demo: Path) -> None:
    checkpoint, expected = Checkpoint(demo), stored(demo)
    assert_same(checkpoint, expected)
    assert checkpoint.get("model.layers.1.mlp.gate.weight_1", (128, 8)).dtype == torch.float32
    assert checkpoint.get("model.layers.1.mlp.experts.15.down_proj.weight", (128, 32)).dtype == torch.bfloat16
    checkpoint.check_all_used(["model.", "vision_model.", "lm_head."])


def test_one_file_without_an_index(demo: Path, tmp_path: Path) -> None:
    assert_same(single(tmp_path / "one", stored(demo)), stored(demo))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("vision_model.", "model.vision_model."),
        lambda name: name.removeprefix("model."),
        lambda name: name if name.startswith("model.") else f"model.{name}",
    ],
    ids=["tower under model.", "no model. anywhere", "model. everywhere"],
)
def test_with_and_without_the_prefix(demo: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    tensors = stored(demo)
    assert_same(single(tmp_path / "renamed", {rename(name): t for name, t in tensors.items()}), tensors)


def test_what_transformers_saves(saved: tuple[Path, oracle.Model]) -> None:
    """save_pretrained writes the original names; the numbers are the model's own."""
    directory, model = saved
    checkpoint = Checkpoint(directory)
    layer = model.model.language_model.layers[2].mlp
    for pool, offset in ((layer.text_moe, 0), (layer.vision_moe, 8)):
        gate_up, down = pool.experts.gate_up_proj, pool.experts.down_proj
        width = down.shape[2]
        for e in range(8):
            expert = f"model.layers.2.mlp.experts.{e + offset}."
            assert torch.equal(checkpoint.get(f"{expert}gate_proj.weight", (width, 128)), gate_up[e, :width])
            assert torch.equal(checkpoint.get(f"{expert}up_proj.weight", (width, 128)), gate_up[e, width:])
            assert torch.equal(checkpoint.get(f"{expert}down_proj.weight", (128, width)), down[e])
    assert torch.equal(checkpoint.get("model.layers.2.mlp.gate.weight", (128, 8)), layer.text_moe.gate.weight.T)
    assert torch.equal(checkpoint.get("model.layers.2.mlp.gate.weight_1", (128, 8)), layer.vision_moe.gate.weight.T)
    resampler = model.model.resampler_model.temporal_linear
    assert torch.equal(checkpoint.get("model.resampler_model.temporal_linear.3.bias", (256,)), resampler.ln.bias)


def test_transformers_native_names_give_the_same(saved: tuple[Path, oracle.Model], tmp_path: Path) -> None:
    directory, model = saved
    native = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert "model.language_model.layers.1.mlp.text_moe.experts.gate_up_proj" in native
    assert "model.vision_tower.blocks.0.attn.qkv.weight" in native
    original = Checkpoint(directory)
    expected = {name: original.get(name, original_shape(original, name)) for name in original.names()}
    expected.pop("lm_head.weight", None)
    checkpoint = single(tmp_path / "native", native)
    assert_same(checkpoint, expected)
    checkpoint.check_all_used([""])


def original_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape as stored, out of the error that names it."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.get(name, (0,))
    return tuple(json.loads(str(error.value).split("has shape ")[1].split(", not")[0]))


def test_native_and_original_names_agree_with_the_demo(demo: Path, tmp_path: Path) -> None:
    """The demo through transformers' conversion and out again under its own names."""
    model = oracle.load_transformers(demo, torch.bfloat16)
    expected = stored(demo)
    native = {name: t.contiguous().clone() for name, t in model.state_dict().items()}
    checkpoint = single(tmp_path / "native", native)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.get(name, tensor.shape), tensor), name


def test_a_missing_tensor_is_named(demo: Path) -> None:
    checkpoint = Checkpoint(demo)
    assert checkpoint.has("model.norm.weight")
    assert not checkpoint.has("model.norm.bias")
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias is missing"):
        checkpoint.get("model.norm.bias", (128,))


def test_a_misshapen_tensor_is_named(demo: Path, saved: tuple[Path, oracle.Model], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .*has shape \[128\], not \[64\]"):
        Checkpoint(demo).get("model.norm.weight", (64,))
    native = {name: t.contiguous() for name, t in saved[1].state_dict().items() if "experts" in name}
    with pytest.raises(
        CheckpointError, match=r"experts\.3\.up_proj.*stored as .*gate_up_proj.*\[64, 128\], not \[63, 128\]"
    ):
        single(tmp_path / "native", native).get("model.layers.1.mlp.experts.3.up_proj.weight", (63, 128))


def test_unexpected_tensors_are_named_under_the_given_prefixes_only(demo: Path, tmp_path: Path) -> None:
    tensors = stored(demo)
    extra = {f"model.layers.9.extra.{i}": torch.zeros(1) for i in range(5)}
    checkpoint = single(tmp_path / "extra", tensors | extra)
    for name, tensor in tensors.items():
        checkpoint.get(name, tensor.shape)
    checkpoint.check_all_used(["vision_model.", "lm_head."])
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.extra\.0, .* and 2 more"):
        checkpoint.check_all_used(["vision_model.", "model.layers."])


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        Checkpoint(tmp_path)


def test_a_pickle_is_not_looked_at(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled"):
        Checkpoint(tmp_path)


def test_an_index_that_names_an_absent_file(demo: Path) -> None:
    (demo / FIRST).unlink()
    with pytest.raises(CheckpointError, match=rf"{FIRST} does not exist"):
        Checkpoint(demo)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file(demo: Path, size: int) -> None:
    whole = (demo / FIRST).read_bytes()
    (demo / FIRST).write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=rf"{FIRST} is no complete safetensors file"):
        Checkpoint(demo)


def test_a_directory_in_place_of_a_shard(demo: Path) -> None:
    (demo / FIRST).unlink()
    (demo / FIRST).mkdir()
    with pytest.raises(CheckpointError, match=FIRST):
        Checkpoint(demo)


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_bytes())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_an_index_that_lists_a_tensor_no_file_has(demo: Path) -> None:
    edit_index(demo, lambda names: names.update({"model.ghost": FIRST}))
    with pytest.raises(CheckpointError, match=rf"model\.ghost in {FIRST}; it is in no file"):
        Checkpoint(demo)


def test_an_index_that_leaves_a_tensor_out(demo: Path) -> None:
    edit_index(demo, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in no file"):
        Checkpoint(demo)


def test_a_tensor_in_two_files(demo: Path) -> None:
    tensors = load_file(demo / FIRST)
    other = "model-00002-of-00003.safetensors"
    save_file(
        load_file(demo / other) | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}, demo / other
    )
    with pytest.raises(CheckpointError, match=rf"model\.embed_tokens\.weight is in {FIRST} and in {other}"):
        Checkpoint(demo)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "", "..", "a/b.safetensors"])
def test_an_index_that_leads_elsewhere(demo: Path, name: str) -> None:
    save_file({"model.norm.weight": torch.ones(128)}, demo.parent / "outside.safetensors")
    edit_index(demo, lambda names: names.update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match=r"no file of the directory|no complete safetensors"):
        Checkpoint(demo)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(demo: Path, content: str) -> None:
    (demo / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint(demo)


@pytest.mark.parametrize(
    ("first", "second", "original"),
    [
        ("vision_model.ln.weight", "model.vision_model.ln.weight", "vision_model.ln.weight"),
        ("vision_model.ln.weight", "model.vision_tower.ln.weight", "vision_model.ln.weight"),
        (
            "model.resampler_model.spatial_linear.3.bias",
            "model.resampler_model.spatial_linear.ln.bias",
            "model.resampler_model.spatial_linear.3.bias",
        ),
    ],
)
def test_one_tensor_under_two_names(tmp_path: Path, first: str, second: str, original: str) -> None:
    with pytest.raises(CheckpointError, match=f"{original} is stored twice: as .* and as "):
        single(tmp_path / "twice", {first: torch.ones(4), second: torch.ones(4)})


def test_half_a_native_bias(tmp_path: Path) -> None:
    name = "model.language_model.layers.1.mlp.text_moe.gate.moe_statics.e_score_correction_bias"
    with pytest.raises(CheckpointError, match="one of the two pools only"):
        single(tmp_path / "half", {name: torch.ones(1, 8)})


def test_a_native_bias_beside_an_original_one(tmp_path: Path) -> None:
    native = "model.language_model.layers.1.mlp.{}_moe.gate.moe_statics.e_score_correction_bias"
    names = [native.format("text"), native.format("vision"), "model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    with pytest.raises(CheckpointError, match="e_score_correction_bias is stored twice"):
        single(tmp_path / "both", {name: torch.ones(1, 8) for name in names})


@pytest.mark.parametrize("shape", [(8, 7, 4), (8, 4)])
def test_fused_experts_of_no_such_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "model.language_model.layers.1.mlp.text_moe.experts.gate_up_proj"
    with pytest.raises(CheckpointError, match="not that of fused experts"):
        single(tmp_path / "odd", {name: torch.ones(shape)})


def test_weights_that_are_already_quantised_are_refused(demo: Path) -> None:
    config = json.loads((demo / "config.json").read_bytes())
    (demo / "config.json").write_text(json.dumps(config | {"quantization_config": {"quantization": "wint4"}}))
    with pytest.raises(CheckpointError, match="quantization_config"):
        Checkpoint(demo)
    (demo / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert Checkpoint(demo).has("model.norm.weight")


@pytest.mark.parametrize("form", [{}, {"quantization": "wint4", "is_quantized": False}])
def test_weights_that_are_to_be_quantised_while_loading_are_plain(demo: Path, form: dict[str, object]) -> None:
    config = json.loads((demo / "config.json").read_bytes())
    (demo / "config.json").write_text(json.dumps(config | {"quantization_config": form}))
    assert_same(Checkpoint(demo), stored(demo))


def test_what_has_no_part_in_the_model_is_ignored_with_a_line_for_each_kind(demo: Path, tmp_path: Path) -> None:
    tensors = stored(demo)
    rotary = ["model.layers.0.self_attn.rotary_emb.inv_freq", "vision_model.rotary_pos_emb.inv_freq", "inv_freq"]
    several = ["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_emb_norm.0.weight", "mtp_linear_proj.0.weight"]
    several += ["model.mtp_hidden_norm.0.weight", "model.mtp.layers.0.norm.weight"]
    directory = tmp_path / "more"
    checkpoint = single(directory, tensors | {name: torch.ones(3) for name in [*rotary, *several]})
    assert checkpoint.warnings == (
        f"{directory}: tensors ignored: 3 named inv_freq; rotary frequencies are computed",
        f"{directory}: tensors ignored: 5 of multi-token prediction (mtp); one token is predicted at a time",
    )
    assert_same(checkpoint, tensors)
    checkpoint.check_all_used(["model.", "vision_model.", "lm_head."])
    assert Checkpoint(demo).warnings == ()


@pytest.mark.parametrize("name", ["model.layers.0.inv_freq.weight", "model.mtpx.weight", "model.empty_block.0.weight"])
def test_what_is_named_a_little_like_it_is_not_ignored(tmp_path: Path, name: str) -> None:
    checkpoint = single(tmp_path / "like", {name: torch.ones(3)})
    assert checkpoint.warnings == ()
    assert checkpoint.has(name)


def test_an_expert_s_number_of_thousands_of_digits_is_an_unexpected_tensor(tmp_path: Path) -> None:
    stored = f"model.layers.1.mlp.text_moe.experts.{'9' * 5000}.up_proj.weight"
    save_file({stored: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensors model\.layers\.1\.mlp\.text_moe\.experts\.9999"):
        Checkpoint(tmp_path).check_all_used(["model."])


def test_headers_only_checks_as_reading_does(demo: Path) -> None:
    headers = Checkpoint(demo, headers_only=True)
    for name, tensor in stored(demo).items():
        given = headers.get(name, tensor.shape)
        assert (given.is_meta, given.shape) == (True, tensor.shape)
    headers.check_all_used(["model.", "vision_model.", "lm_head."])
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias is missing"):
        headers.get("model.norm.bias", (128,))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .*has shape \[128\], not \[64\]"):
        headers.get("model.norm.weight", (64,))


def test_headers_only_knows_the_shapes_of_native_tensors(saved: tuple[Path, oracle.Model], tmp_path: Path) -> None:
    """Slices of fused experts, transposed gates, a bias in two halves."""
    native = {name: t.contiguous() for name, t in saved[1].state_dict().items() if name != "lm_head.weight"}
    read = single(tmp_path / "native", native)
    headers = Checkpoint(tmp_path / "native", headers_only=True)
    for name in read.names():
        shape = original_shape(read, name)
        assert read.get(name, shape).shape == headers.get(name, shape).shape


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_a_quantised_tensor_that_nothing_names_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = single(tmp_path / "odd", {"model.norm.weight": torch.ones(4).to(dtype)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* is stored as \w+; only BF16, F16, F32, F64"):
        checkpoint.get("model.norm.weight", (4,))


def test_shards_without_an_index_are_read_with_a_warning(demo: Path) -> None:
    expected = stored(demo)
    (demo / INDEX).unlink()
    checkpoint = Checkpoint(demo)
    assert checkpoint.warnings == (f"{demo}: there is no {INDEX}; the 3 shards are read without it",)
    assert_same(checkpoint, expected)
    (demo / FIRST).unlink()
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is missing"):
        Checkpoint(demo).get("model.embed_tokens.weight", (2048, 128))
