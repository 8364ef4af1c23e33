"""One small model and its checkpoint for all tests of the decoder."""

from pathlib import Path

import pytest
from decoder_judge import Judge
from oracle import Model, save_with_transformers

from services.engine.kernels.ops import Ops
from services.engine.model.ernie import ErnieModel
from services.engine.model.weights import load_model
from shared.model.checkpoint import Checkpoint
from shared.model.config import load_model_config


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    directory = tmp_path_factory.mktemp("decoder") / "checkpoint"
    return directory, save_with_transformers(directory)


@pytest.fixture(scope="session")
def checkpoint_dir(saved: tuple[Path, Model]) -> Path:
    return saved[0]


@pytest.fixture(scope="session")
def judge(saved: tuple[Path, Model]) -> Judge:
    return Judge(saved[1])


@pytest.fixture(scope="session")
def model(checkpoint_dir: Path) -> ErnieModel:
    return load_model(Checkpoint(checkpoint_dir), load_model_config(checkpoint_dir), "cpu", None, Ops())
