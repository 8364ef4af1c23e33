"""Running systems for the client tests: one with random weights, one whose answer is known."""

from collections.abc import Iterator

import pytest
from machine import PATIENCE_S
from openai import OpenAI
from scripted_model import write_scripted
from system import System, running

from cli.demo import write_demo

SMALL_VIDEOS = '{"video_min_pixels": 3136, "video_max_pixels": 12544}'
API_KEY = "a-secret"


@pytest.fixture(scope="package")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Random weights, room for several images and a way to this machine's http server.

    In float32: what a request is batched with, and what it finds cached, then never changes which token is drawn.
    """
    directory = tmp_path_factory.mktemp("random")
    write_demo(directory / "demo", dtype="float32")
    arguments = ["--model", str(directory / "demo"), "--max-model-len", "4096"]
    arguments += ["--limit-mm-per-prompt", '{"image": 3, "video": 1}', "--mm-processor-kwargs", SMALL_VIDEOS]
    # Bad media are a 400 in a stream, too, however long it takes to find them.
    patient = {"MILLRACE_HOLD_HEADERS_S": str(PATIENCE_S)}
    with running([*arguments, "--media-allow-network", "127.0.0.1/32"], directory, patient) as system:
        yield system


@pytest.fixture
def client(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="package")
def scripted_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A model that always answers scripted_model.SCRIPT, behind a key, under two names of its own."""
    directory = tmp_path_factory.mktemp("scripted")
    write_scripted(directory / "checkpoint")
    arguments = ["--model", str(directory / "checkpoint"), "--api-key", API_KEY]
    arguments += ["--served-model-name", "script", "play"]
    with running(arguments, directory) as system:
        yield system


@pytest.fixture
def scripted(scripted_system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{scripted_system.base_url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client
