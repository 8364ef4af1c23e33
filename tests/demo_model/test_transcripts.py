"""The README's examples and docs/first-ten-minutes.md, replayed: each command says what is written below it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from machine import PATIENCE_S
from system import System, running

from cli.flags import parse
from cli.serve import announce

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/first-ten-minutes.md")
START = "make serve"
WARNING = "millrace: warning: "  # of who can reach it; here nobody can

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not all(map(shutil.which, ("curl", "jq", "make"))), reason="needs curl, jq and make"),
]


class Step(msgspec.Struct, frozen=True):
    """A command and what it says."""

    page: str
    command: str
    said: str


def steps(page: str) -> list[Step]:
    """Return the commands of a page: each goes on while its quotes or its here-document are open."""
    found = []
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", (ROOT / page).read_text(), re.MULTILINE):
        text = "\n".join(line.removeprefix("    ") for line in block.splitlines())
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, said = split(part)
            found.append(Step(page, command, said.strip("\n")))
    return found


def split(part: str) -> tuple[str, str]:
    lines = part.splitlines()
    if ending := re.search(r"<<(\w+)$", lines[0]):
        last = lines.index(ending[1])
    else:
        last = next(i for i in range(len(lines)) if is_complete("\n".join(lines[: i + 1])))
    return "\n".join(lines[: last + 1]), "\n".join(lines[last + 1 :])


def is_complete(command: str) -> bool:
    try:
        shlex.split(command)
    except ValueError:
        return False
    return not command.endswith("\\")


STEPS = [step for page in PAGES for step in steps(page)]
ASKED = [step for step in STEPS if step.command != START]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """What `make serve` starts, by what make says that it would run."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    said = subprocess.run(
        ["make", "-n", START.split()[1]], cwd=ROOT, env=ours, capture_output=True, text=True, check=True
    )
    words = shlex.split(said.stdout.splitlines()[-1])
    flags = words[words.index("serve") + 1 : words.index("--port")]
    flags[flags.index("--model") + 1] = str(ROOT / flags[flags.index("--model") + 1])
    directory = tmp_path_factory.mktemp("served")
    with running(flags, directory, {"TMPDIR": str(directory)}) as system:
        system.wait_for("Ctrl-C stops")
        yield system


def here(text: str, system: System) -> str:
    """Return text with the ports of the system that runs here, and the model where it is."""
    ports = {"8180": system.port, "8181": system.metrics_port}
    text = re.sub(r"(?<=[a-z1]:)818[01]\b", lambda found: str(ports[found[0]]), text)
    return text.replace("serving cli/", f"serving {ROOT}/cli/")


def shows(said: str, expected: str) -> bool:
    """Return True if `expected` is said, with anything in place of `...`, whatever the white space."""
    pattern = ".*?".join(re.escape("".join(part.split())) for part in expected.split("..."))
    return re.search(pattern, "".join(said.split()), re.DOTALL) is not None


def run(step: Step, system: System) -> str:
    """Run a command, and return what it says."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", here(step.command, system)],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "TMPDIR": str(system.directory)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("step", ASKED, ids=lambda step: f"{step.page}: {step.command[:60]}")
def test_a_command_says_what_the_page_says(served: System, step: Step) -> None:
    assert step.said
    said, until = run(step, served), time.monotonic() + PATIENCE_S
    # What is in work stands in leases, which are renewed now and then: right after an answer they may still have it.
    while step.command.endswith("millrace status") and not shows(said, step.said) and time.monotonic() < until:
        said = run(step, served)
    assert shows(said, step.said), said


def test_the_page_shows_what_the_terminal_does_from_start_to_end(served: System) -> None:
    """Last in this file: it stops the system, which the fixture does again."""
    begin, end = [step.said.splitlines() for step in STEPS if step.command == START]
    served.stop()
    log = served.log.read_text().splitlines()
    for line in begin + end:
        if line.startswith(WARNING):
            assert line.removeprefix("millrace: ") in announce(parse(["--demo"], {}), "0.0.0.0", has_keys=False)
        else:
            assert any(shows(each, here(line, served)) for each in log), line


def test_the_pages_have_all_that_a_beginner_needs() -> None:
    assert len(ASKED) >= 13
    for needed in ("image_url", "video_url", '"tools"', "enable_thinking", "from openai import OpenAI"):
        assert any(needed in step.command for step in STEPS if step.page == "README.md"), needed


def test_what_is_not_said_is_noticed() -> None:
    assert shows('{"a": 1, "b": [2]}', '{"a":1,...[2]}')
    assert not shows('{"a": 1}', '{"a":2...')
    assert split("curl -d '{\n  1}'\nsaid\n") == ("curl -d '{\n  1}'", "said")
    assert split("python3 <<END\nprint('a')\nEND\na\n") == ("python3 <<END\nprint('a')\nEND", "a")
