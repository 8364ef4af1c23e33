"""What the tests of the whole pipeline share."""

import pytest
import torch
from oracle import save_with_transformers
from pipeline_judge import Judge


@pytest.fixture(scope="package")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    directory = tmp_path_factory.mktemp("judge") / "checkpoint"
    return Judge(directory, save_with_transformers(directory, torch.float32))
