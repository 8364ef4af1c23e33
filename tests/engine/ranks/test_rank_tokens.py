"""The engine as several processes that share the model: the same tokens as one, for requests of every kind."""

from pathlib import Path

import pytest
from near_ties import NEAR_TIE, judging
from rank_cases import Loaded, answers, write_checkpoint

from shared.model.config import load_model_config

pytestmark = pytest.mark.system
Answers = dict[str, dict[str, list[int]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks") / "checkpoint"
    write_checkpoint(made)
    return made


def steady(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, Answers]:
    """Return a seed with which no token hangs on how sums are rounded, and the tokens of one process."""
    for seed in range(20):
        capsys.readouterr()
        with judging(), Loaded(directory, 1) as runner:
            found = answers(runner, load_model_config(directory), seed)
        if NEAR_TIE not in capsys.readouterr().err:
            return seed, found
    raise AssertionError("with each seed there is a near tie; take other prompts")


def test_ranks_draw_the_tokens_of_one_process(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_model_config(directory)
    seed, alone = steady(directory, capsys)
    assert all(len(set(tokens)) > 3 for name, tokens in alone["whole"].items() if name != "grammar")
    for size in (2, 4):
        loaded = Loaded(directory, size)
        with loaded as runner:
            assert answers(runner, config, seed) == alone
            assert loaded.ranks is not None
            assert loaded.ranks.orders.checked.steps > 90  # compared by every rank
