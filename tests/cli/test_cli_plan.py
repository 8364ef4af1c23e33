"""`millrace plan`: FastDeploy's launches and table, and what it says where nothing fits."""

import json
import re
from pathlib import Path

import hub_files
import pytest
from quantised_files import with_library, write_quantised

from cli.demo import write_demo
from cli.main import main
from cli.plan import CARDS, RANKS, table
from services.engine.kernels.ops import Ops
from services.engine.model.split import Split
from services.engine.model.weights import load_model
from services.engine.run.footprint import weight_bytes
from services.engine.run.foretold import foretell
from services.engine.settings import EngineSettings
from shared.errors import CheckpointError
from shared.model.checkpoint import Checkpoint
from shared.model.config import load_model_config

ROOT = Path(__file__).parents[2]
LAUNCH = ["--max-num-batched-tokens", "16384", "--image-max-pixels", "12845056", "--quantization", "wint4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the published model's configuration, and nothing else."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(hub_files.thinking()))
    return directory


def test_the_page_is_current(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "cards.md").read_text()
    assert "\n".join(table(load_model_config(model))) in page
    assert main(["plan", "--model", str(model), "--card", "RTX-4090", *LAUNCH]) == 0
    assert all(f"    {line}" in page for line in capsys.readouterr().out.splitlines())


def test_the_page_of_one_machine_says_the_same() -> None:
    """Of cards that have not been tried, which are named there by their memory."""
    cards, machine = ((ROOT / "docs" / name).read_text() for name in ("cards.md", "one-machine.md"))
    rows = re.findall(r"\| (\d+ GB) \| `?(wint4|wint8|bf16)`? \| \S+ \| (\S+),000 \| by arithmetic", machine)
    assert len(rows) == 5
    for memory, form, thousands in rows:
        held = re.findall(rf"^\| \S+, {memory} \|(.*)\|(.*)\|(.*)\|.*\|$", cards, re.MULTILINE)
        assert held
        nth = ("wint4", "wint8", "bf16").index(form)
        assert all(cells[nth].strip() == f"1 ({thousands}K tokens)" for cells in held)


@pytest.mark.parametrize(("card", "tokens"), [("RTX-4090", 2048), ("L20", 8192), ("H200", 8192)])
def test_the_tokens_of_a_step_are_those_the_engine_would_choose(
    model: Path, card: str, tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(model), "--card", card, "--quantization", "wint4"]) == 0
    assert f": steps of {tokens} tokens, workspaces\n" in capsys.readouterr().out


def test_fastdeploys_table_holds_with_no_more_cards(model: Path) -> None:
    rows = [line.split("|")[2:5] for line in table(load_model_config(model))[2:]]
    assert len(rows) == len(CARDS)
    for cells, card in zip(rows, CARDS, strict=True):
        ours = [int(cell.split()[0]) for cell in cells]
        assert card.fastdeploy is None or all(own <= theirs for own, theirs in zip(ours, card.fastdeploy, strict=True))
        assert set(ours) <= set(RANKS)


def test_the_launch_on_two_cards(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*LAUNCH, "--tensor-parallel-size", "2", "--max-model-len", "131072", "--max-num-seqs", "128"]
    assert main(["plan", "--model", str(model), "--card", "h800", *flags]) == 0
    said = capsys.readouterr().out
    assert "verdict         fits\n" in said
    assert " of 131072 tokens at once, or 128 of " in said


def test_what_does_not_fit_is_told_with_what_is_missing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(model), "--memory", "24GB"]) == 1
    said = capsys.readouterr().out
    assert "GiB too little for one sequence of 32768 tokens" in said
    assert "bf16: 4" in said
    assert "verdict         does not fit" in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--card", "Voodoo2"], "'Voodoo2' is none of A30"),
        (["--memory", "48"], "'48' is not a size"),
        (["--card", "L20", "--max-model-len", "200000"], "--max-model-len: 200000 is more than the 131072"),
        (["--card", "L20", "--max-num-seqs", "999"], "max_num_seqs is 999"),
        (["--card", "L20", "--max-num-batched-tokens", "-5"], "max_num_batched_tokens is -5"),
        (["--card", "L20", "--tensor-parallel-size", "3"], "--tensor-parallel-size"),
        ([], "--card"),
    ],
)
def test_a_wrong_flag_is_named(model: Path, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(model), *flags]) == 2
    assert named in capsys.readouterr().err


def test_weights_that_are_quantised_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the headers of their files, what loading them takes; of ours, what quantising at the start does."""
    write_demo(tmp_path / "demo")
    form = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
    theirs, _ = write_quantised(tmp_path / "demo", tmp_path / "theirs", *with_library(**form))
    config = load_model_config(theirs)
    weights = load_model(Checkpoint(theirs), config, "cpu", None, Ops()).weights
    settings = EngineSettings(redis_url="", model="", max_model_len=4096)
    foretold = foretell(config, settings, 8 << 30, checkpoint=Checkpoint(theirs, headers_only=True))
    # Headers do not tell that the stored head is the embedding.
    assert foretold.weights == weight_bytes(weights, None) + weights.embedding.nbytes
    memory = ["--memory", "8GiB", "--max-model-len", "4096"]
    assert main(["plan", "--model", str(theirs), *memory]) == 0
    said = capsys.readouterr().out
    assert "GiB, compressed-tensors\n" in said
    assert "cards needed    compressed-tensors: 1" in said
    for flags, named in ((["--quantization", "wint8"], "quantised already"), (["--table"], "--table compares formats")):
        given = flags if "--table" in flags else [*memory, *flags]
        assert main(["plan", "--model", str(theirs), *given]) == 2
        assert named in capsys.readouterr().err

    words = ["--model", str(tmp_path / "demo"), "--output", str(tmp_path / "ours"), "--quantization", "wint4"]
    assert main(["quantize", *words]) == 0
    capsys.readouterr()
    assert main(["plan", "--model", str(tmp_path / "demo"), *memory, "--quantization", "wint4"]) == 0
    at_start = capsys.readouterr().out.split("cards needed")[0]
    assert main(["plan", "--model", str(tmp_path / "ours"), *memory]) == 0
    assert capsys.readouterr().out.split("cards needed")[0] == at_start


def test_groups_of_ours_that_ranks_would_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine would refuse is refused, and is no number of cards that are needed."""
    monkeypatch.setattr("cli.demo.EXPERT_SIZES", (192, 32))
    write_demo(tmp_path / "demo")
    words = ["--model", str(tmp_path / "demo"), "--output", str(tmp_path / "ours"), "--quantization", "wint4"]
    assert main(["quantize", *words]) == 0
    ours = tmp_path / "ours"
    with pytest.raises(CheckpointError, match=r"groups of 128 inputs, .* the 96 inputs") as refused:
        load_model(Checkpoint(ours), load_model_config(ours), "cpu", None, Ops(), Split(0, 2))
    capsys.readouterr()
    plan = ["plan", "--model", str(ours), "--max-model-len", "4096", "--memory"]
    assert main([*plan, "8GiB", "--tensor-parallel-size", "2"]) == 2
    assert str(refused.value) in capsys.readouterr().err
    assert main([*plan, "8GiB"]) == 0
    assert "cards needed    wint4: 1\n" in capsys.readouterr().out
    assert main([*plan, "1GiB"]) == 1
    said = capsys.readouterr().out
    assert "cards needed    wint4: more than 4\n" in said
    assert "verdict         does not fit" in said


def test_cards_that_cannot_share_the_heads_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = hub_files.thinking()
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    assert main(["plan", "--model", str(tmp_path), "--memory", "24GB"]) == 1
    said = capsys.readouterr().out
    assert "bf16: more than 4\n" in said
    assert main(["plan", "--model", str(tmp_path), "--memory", "24GB", "--tensor-parallel-size", "2"]) == 2
    assert "1 key-value heads" in capsys.readouterr().err
