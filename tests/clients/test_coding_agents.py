"""Coding agents as published, each in one turn against a model whose answer is known.

`make test-clients` installs them and names the folder in CLIENT_PACKAGES; without it, all is skipped. They run in a
home of their own and are told to send nothing to anybody else.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import PATIENCE_S
from scripted_model import PLAIN_ANSWER, PLAIN_SCRIPT, write_scripted
from system import System, running

PROGRAMS = (
    Path(os.environ["CLIENT_PACKAGES"]) / "agents" / "node_modules" / ".bin"
    if "CLIENT_PACKAGES" in os.environ
    else None
)
SYSTEM_PROMPT = "You are a helpful assistant."
QUESTION = "What is the weather?"

pytestmark = pytest.mark.skipif(PROGRAMS is None, reason="make test-clients installs the agents")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A model that answers PLAIN_SCRIPT."""
    directory = tmp_path_factory.mktemp("agents")
    write_scripted(directory / "checkpoint", PLAIN_SCRIPT)
    # On a CPU a step of 8,192 tokens takes long.
    arguments = ["--model", str(directory / "checkpoint"), "--max-num-batched-tokens", "1024"]
    with running([*arguments, "--served-model-name", "demo"], directory) as system:
        yield system


def asked(command: list[str], home: Path, environ: dict[str, str]) -> list[dict[str, object]]:
    """Run an agent that prints a JSON object a line, and return them."""
    assert PROGRAMS is not None
    (home / "work").mkdir()
    done = subprocess.run(
        [str(PROGRAMS / command[0]), *command[1:]],
        env={"PATH": os.environ["PATH"], "HOME": str(home), **environ},
        cwd=home / "work",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout[-10_000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_codex_speaks_responses(scripted: System, tmp_path: Path) -> None:
    (tmp_path / "prompt.md").write_text(SYSTEM_PROMPT)
    settings = {
        "model": "demo",
        "model_provider": "millrace",
        "model_providers.millrace.name": "millrace",
        "model_providers.millrace.base_url": f"{scripted.base_url}/v1",
        "model_providers.millrace.wire_api": "responses",
        "web_search": "disabled",
        "model_instructions_file": str(tmp_path / "prompt.md"),
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={json.dumps(value)}")]
    told = asked(["codex", "exec", "--skip-git-repo-check", "--json", *options, QUESTION], tmp_path, {})
    answers = [event["item"]["text"] for event in told if event["type"] == "item.completed" and "text" in event["item"]]  # type: ignore[index,operator]
    assert [answer.strip() for answer in answers] == [PLAIN_ANSWER.strip()]
    assert told[-1]["type"] == "turn.completed"


def test_claude_code_speaks_messages(scripted: System, tmp_path: Path) -> None:
    environ = {
        "ANTHROPIC_BASE_URL": scripted.base_url,
        "ANTHROPIC_API_KEY": "none",
        "ANTHROPIC_MODEL": "demo",
        "ANTHROPIC_SMALL_FAST_MODEL": "demo",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    words = ["--system-prompt", SYSTEM_PROMPT, "--tools", "Read", "--output-format", "json"]
    (told,) = asked(["claude", "-p", QUESTION, *words], tmp_path, environ)
    assert (told["is_error"], told["stop_reason"]) == (False, "end_turn")
    assert str(told["result"]).strip() == PLAIN_ANSWER.strip()
