"""`millrace check` on what people have on disk: what is served, what is not and why, in words, JSON and exit status."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_files
import pytest
import quantised_files
import torch
from safetensors.torch import load_file, save_file

from cli.check import LABEL
from cli.demo import write_demo
from cli.main import main

Tensors = dict[str, torch.Tensor]
pytestmark = pytest.mark.system  # the chat template is rendered in a process
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(directory)
    return directory


@pytest.fixture
def demo(original: Path, tmp_path: Path) -> Path:
    """A directory in the hub's layout, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def configure(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps(config | changes))


def rewrite(directory: Path, change: Callable[[str, torch.Tensor], Tensors]) -> None:
    """Each tensor as others store it, in one file."""
    stored: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            stored |= change(name, tensor)
        path.unlink()
    (directory / INDEX).unlink()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")


def is_projection(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


# ------------------------------------------------------------------------------------------- what is made of the demo


def hub_flat(directory: Path) -> None:
    """As it is."""


def hub_nested(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps(hub_files.nested(config)))


def paddle(directory: Path) -> None:
    """Projections transposed, and names that begin with ernie."""

    def stored(name: str, tensor: torch.Tensor) -> Tensors:
        tensor = tensor.T if is_projection(name) else tensor
        return {name.replace("model.", "ernie.", 1) if name.startswith("model.") else name: tensor}

    rewrite(directory, stored)
    configure(directory, dtype="bfloat16", torch_dtype=None)


def fastdeploy_wint4(directory: Path) -> None:
    def stored(name: str, tensor: torch.Tensor) -> Tensors:
        if not is_projection(name):
            return {name: tensor}
        base = name.removesuffix("weight")
        return {f"{base}quant_weight": tensor.T.to(torch.int8), f"{base}weight_scale": tensor[:, 0]}

    rewrite(directory, stored)
    mixed = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4", "is_quantized": True}
    configure(directory, quantization_config=mixed)


def awq(directory: Path) -> None:
    quantise, config = quantised_files.awq(32)
    quantised(directory, quantise, config)


def gptq_by_activations(directory: Path) -> None:
    quantise, config = quantised_files.gptq(32, symmetric=True)
    quantised(directory, quantise, config | {"desc_act": True})


def compressed_tensors(directory: Path) -> None:
    form = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    quantised(directory, *quantised_files.with_library(**form))


def compressed_tensors_without_a_scale(directory: Path) -> None:
    compressed_tensors(directory)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.9.up_proj.weight_scale"]
    save_file(tensors, directory / "model.safetensors")


def compressed_tensors_of_activations(directory: Path) -> None:
    quantise, config = quantised_files.with_library(num_bits=8, strategy="channel")
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    quantised(directory, quantise, config)


def quantised(directory: Path, quantise: quantised_files.Quantise, config: dict[str, Any]) -> None:
    written, _ = quantised_files.write_quantised(directory, directory.parent / "forms", quantise, config)
    shutil.rmtree(directory)
    shutil.move(written, directory)


def mlx(directory: Path) -> None:
    def stored(name: str, tensor: torch.Tensor) -> Tensors:
        name = name.replace("model.", "language_model.model.", 1) if name.startswith("model.layers.") else name
        if not name.endswith("_proj.weight"):
            return {name: tensor}
        base = name.removesuffix("weight")
        return {name: tensor.to(torch.int32), f"{base}scales": tensor[:, :1], f"{base}biases": tensor[:, :1].clone()}

    rewrite(directory, stored)
    configure(directory, quantization={"group_size": 64, "bits": 4}, quantization_config={"group_size": 64, "bits": 4})


def gguf(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "ERNIE-4.5-VL-28B-A3B-Thinking-Q4_K_M.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))


def truncated_shard(directory: Path) -> None:
    whole = (directory / SECOND).read_bytes()
    (directory / SECOND).write_bytes(whole[: len(whole) // 2])


def missing_index(directory: Path) -> None:
    (directory / INDEX).unlink()


def wrong_vocabulary(directory: Path) -> None:
    """A tokenizer with more tokens than the model has rows for."""
    more = {f"extra{i}": 1644 + i for i in range(1000)}
    (directory / "added_tokens.json").write_text(json.dumps(more))


def no_template(directory: Path) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_bytes())
    del config["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.model").unlink()


def another_model(directory: Path) -> None:
    configure(directory, model_type="qwen3_vl_moe")


def snapshot_without_its_blobs(directory: Path) -> None:
    """As where a container mounts snapshots/REVISION of a hub cache and not the folder above."""
    (directory / SECOND).unlink()
    (directory / SECOND).symlink_to("../../blobs/0f5e")


def broken_link_beside(directory: Path) -> None:
    (directory / "consolidated.safetensors").symlink_to("nowhere")


def empty_font(directory: Path) -> None:
    (directory / "Roboto-Regular.ttf").write_bytes(b"")


def empty_config(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"")


def config_nested_too_deep(directory: Path) -> None:
    (directory / "config.json").write_text("[" * 100_000)


def infinite_epsilon(directory: Path) -> None:
    configure(directory, rms_norm_eps=float("inf"))


def empty_generation_config(directory: Path) -> None:
    """Two readers fail on it, and it is said once."""
    (directory / "generation_config.json").write_bytes(b"")


def index_with_a_tensor_too_many(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_bytes())
    index["weight_map"]["model.layers.9.extra"] = SECOND
    (directory / INDEX).write_text(json.dumps(index))


def index_with_no_file_name(directory: Path) -> None:
    """Half a surrogate pair is valid JSON, and no file's name."""
    index = json.loads((directory / INDEX).read_bytes())
    index["weight_map"]["model.norm.weight"] = "\ud800"
    (directory / INDEX).write_text(json.dumps(index))


DIRECTORIES: list[tuple[Callable[[Path], None], bool, str]] = [
    (hub_flat, True, ""),
    (hub_nested, True, ""),
    (paddle, False, "tensor ernie."),
    (fastdeploy_wint4, False, "was quantised by FastDeploy ahead of time"),
    (awq, True, "scales of quantised weights are stored as F16 and rounded to bfloat16"),
    (gptq_by_activations, False, "desc_act is True; what is read is False"),
    (compressed_tensors, True, ""),
    (compressed_tensors_without_a_scale, False, "experts.9.up_proj.weight_scale is missing"),
    (compressed_tensors_of_activations, False, "config_groups.group_0.input_activations is {'num_bits': 8}"),
    (mlx, False, "is in MLX's format"),
    (gguf, False, "is GGUF, llama.cpp's format"),
    (truncated_shard, False, f"{SECOND} is no complete safetensors file"),
    (missing_index, True, f"there is no {INDEX}; the 3 shards are read without it"),
    (wrong_vocabulary, False, "the tokenizer has the id 2048, for which the embedding has no row"),
    (no_template, True, "has no chat template; the built-in one, ernie_thinking.jinja, is used"),
    (no_tokenizer, False, "has neither tokenizer.model nor tokenizer.json"),
    (another_model, False, "model_type is 'qwen3_vl_moe', not ernie4_5_moe_vl"),
    (snapshot_without_its_blobs, False, f"{SECOND} is a symbolic link to ../../blobs/0f5e, where there is no file"),
    (broken_link_beside, True, ""),
    (empty_font, False, "Roboto-Regular.ttf is no font that can be read"),
    (empty_config, False, "config.json: Expecting value: line 1 column 1"),
    (config_nested_too_deep, False, "config.json: maximum recursion depth exceeded"),
    (infinite_epsilon, False, "at `$.rms_norm_eps`"),
    (empty_generation_config, False, "generation_config.json: Expecting value: line 1 column 1"),
    (index_with_a_tensor_too_many, False, f"puts tensor model.layers.9.extra in {SECOND}; it is in no file"),
    (index_with_no_file_name, False, "is no complete safetensors file"),
]


@pytest.mark.parametrize(("change", "served", "said"), DIRECTORIES, ids=lambda value: getattr(value, "__name__", None))
def test_what_people_have_on_disk(
    demo: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], served: bool, said: str
) -> None:
    """One remark each, which is the error where it is not served; nothing else is wrong with any of them."""
    change(demo)
    status = main(["check", str(demo), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (status, report["served"]) == (0 if served else 1, served)
    remarks = report["warnings"] if served else report["errors"]
    assert len(remarks) == bool(said), remarks
    assert all(said in remark and (str(demo) in remark or change is awq) for remark in remarks)


def test_what_will_be_served(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(demo), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["directory"], report["errors"], report["warnings"]) == (str(demo), [], [])
    model = report["model"]
    assert (model["num_layers"], model["num_experts"], model["dense_layers"], model["time_freqs"]) == (4, 8, [0], 4)
    assert report["sampling"]["top_p"] == 0.8
    assert report["weight_files"] == {path.name: path.stat().st_size for path in demo.glob("*.safetensors")}
    memory = report["memory"]
    assert memory["decoder"]["wint8"] < memory["decoder_large_card"]["wint8"] < memory["decoder"]["bfloat16"]
    assert memory["head"] == 2048 * 128 * 2
    assert memory["cache_per_context"] == 131072 * memory["cache_per_token"]
    assert report["tokens"]["end"] == {"2": "</s>"}
    assert report["tokens"]["special"]["<|IMAGE_START|>"] == model["image_start_id"]
    assert report["chat"]["template"] == "tokenizer_config.json"
    assert report["chat"]["rendered"].endswith("<|IMAGE_END|>What does the sign say?\nAssistant: \n<think>\n")
    assert report["chat"]["thinking"]


def test_the_words(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (demo / "Roboto-Regular.ttf").unlink()
    configure(demo, quantization_config={"quantization": "wint4", "is_quantized": False})
    assert main(["check", str(demo)]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line[:LABEL].strip(): line[LABEL:] for line in lines}
    assert said["mrope sections"] == "6 height, 6 width, 4 time; theta 500000"
    assert said["dense layers"] == "0; 256 wide"
    assert said["end ids"] == "2 </s>"
    assert said["chat template"] == "tokenizer_config.json"
    assert said["quantization"] == "wint4, as config.json asks; --quantization decides otherwise"
    font = f"{demo}/Roboto-Regular.ttf does not exist; font-roboto's is used for the time in video frames"
    assert said["warning"] == font
    assert (lines[-1], said["verdict"]) == (f"{'verdict':{LABEL}}will be served", "will be served")


def test_everything_that_is_wrong_is_said_at_once(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_tokenizer(demo)
    (demo / "preprocessor_config.json").write_text('{"image_std": [0, 1, 1]}')
    (demo / "generation_config.json").write_text('{"top_p": 2}')
    rewrite(demo, lambda name, tensor: {} if name == "vision_model.ln.bias" else {name: tensor})
    assert main(["check", str(demo)]) == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error ")]
    assert len(errors) == 4
    for said in ("generation_config.json", "tokenizer.model", "vision_model.ln.bias is missing", "image_std"):
        assert any(said in error for error in errors), said


def test_a_template_that_takes_no_pictures(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (demo / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    assert main(["check", str(demo)]) == 1
    assert "a question about a picture cannot be asked: The chat template" in capsys.readouterr().out


def test_a_terminal_obeys_no_checkpoint(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = "\x1b[2J\x9b2J\rno\nverdict         will be served"
    (demo / "chat_template.jinja").write_text(f"{{{{ raise_exception({forged!r}) }}}}")
    assert main(["check", str(demo)]) == 1
    printed = capsys.readouterr().out
    assert r"\x1b[2J\x9b2J\rno\nverdict" in printed
    assert all(one.isprintable() or one == "\n" for one in printed)
    assert "verdict         will be served" not in printed.splitlines()


@pytest.mark.parametrize("words", [[], ["/nowhere/at/all"], ["--bogus", "."], ["a" * 300]])
def test_what_cannot_be_asked(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    assert "millrace check: error: " in capsys.readouterr().err


def test_a_directory_whose_name_is_no_utf8(original: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """safetensors opens no such path; that is said in words and in JSON that any reader takes."""
    directory = shutil.copytree(original, Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff del")))
    assert main(["check", str(directory)]) == 1
    assert "/m\\udcff del/model-00001-of-00003.safetensors is no complete" in capfd.readouterr().out
    assert main(["check", str(directory), "--json"]) == 1
    report = json.loads(capfd.readouterr().out.encode("ascii"))
    assert (report["directory"], len(report["errors"])) == (str(directory), 1)


@pytest.mark.system
def test_serving_says_the_same(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf(demo)
    assert main(["serve", "--model", str(demo)]) == 2
    assert "is GGUF, llama.cpp's format" in capsys.readouterr().err
