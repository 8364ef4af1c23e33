"""The benchmark of guesses: a model of random weights says what its script has, with guesses and without."""

import pytest
import torch

from benchmarks.engine import Bench
from benchmarks.scripted_answers import DRAWN, PAIR, ScriptedBench
from benchmarks.speculation import GUESSES, measure
from benchmarks.structured import SMALL
from services.engine.kernels.ops import Ops
from services.engine.model.ernie import ErnieModel
from services.engine.model.weights import load_weights
from services.engine.run.assembly import runner_for
from services.engine.schedule.sequence import EngineFacts
from services.engine.settings import EngineSettings
from shared.metrics import value
from shared.model.drawn_weights import DrawnWeights

LENGTH = 24


class SmallBench(Bench):
    """Small model of the published vocabulary on a CPU."""

    def __init__(self) -> None:
        self.settings = EngineSettings(
            redis_url="unix:///unused", model="unused", max_model_len=1024, max_num_seqs=12,
            max_num_batched_tokens=512, enable_prefix_caching=False, speculative_config=GUESSES,
        )  # fmt: skip
        self.facts = EngineFacts(SMALL, 1024, think_close_id=3)
        cpu = torch.device("cpu")
        model = ErnieModel(SMALL, load_weights(DrawnWeights(cpu), SMALL, torch.float32, cpu, None), Ops())
        self.runner, self._blocks = runner_for(model, SMALL, self.settings)


@pytest.fixture(scope="module")
def bench() -> ScriptedBench:
    return ScriptedBench(SmallBench(), LENGTH)


@pytest.mark.parametrize("kind", ["copy", "free"])
def test_what_is_said_is_the_script(bench: ScriptedBench, kind: str) -> None:
    prompts = bench.prompts(kind, 2)
    for guesses in (False, True):
        said = bench.run(prompts, guesses).tokens
        assert [said[f"{index:016x}"] for index in range(2)] == [
            each.answer[:LENGTH] for each in prompts if each.answer
        ]


def test_a_copy_takes_fewer_steps(bench: ScriptedBench) -> None:
    figures = measure(bench, "copy", 1, rounds=1)
    assert figures["same"]
    assert figures["steps"] < 0.7
    assert figures["tokens"] == LENGTH


def test_what_is_drawn_is_the_models_and_is_guessed_at_times(bench: ScriptedBench) -> None:
    prompts = bench.prompts(DRAWN, 2)
    plain, guessed = (bench.run(prompts, guesses) for guesses in (False, True))
    assert plain.tokens == guessed.tokens
    assert {token for said in plain.tokens.values() for token in said} == set(PAIR)
    assert value(guessed.metrics.accepted_tokens) > 0
