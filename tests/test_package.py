"""The package as others meet it: one version everywhere, its licence, its Pythons, and what `make` says."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import type_check
import yaml
from machine import PATIENCE_S

from cli.installation import services_are_found
from cli.main import COMMANDS, main
from shared.version import MILLRACE_VERSION

ROOT = Path(__file__).resolve().parent.parent
CONFIGURED = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIGURED["project"]
CHART = yaml.safe_load((ROOT / "helm" / "Chart.yaml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


def test_package_chart_and_command_have_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"millrace {MILLRACE_VERSION}\n"
    assert (CHART["version"], CHART["appVersion"]) == (MILLRACE_VERSION, MILLRACE_VERSION)


def test_the_images_are_tagged_with_it_in_the_documentation() -> None:
    tags = re.findall(r"REGISTRY/millrace-[\w-]+:([\w.-]+)", (ROOT / "docs" / "operations.md").read_text())
    assert set(tags) == {MILLRACE_VERSION}


def test_the_changelog_begins_with_it() -> None:
    first = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == MILLRACE_VERSION


def test_the_licence_is_the_one_that_the_package_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_pythons_are_the_same_everywhere() -> None:
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    made = re.search(r"^VERSIONS := (.*)$", MAKEFILE, re.MULTILINE)
    assert made is not None
    assert made[1].split() == classified
    first, last = (int(version.split(".")[1]) for version in (classified[0], classified[-1]))
    assert PROJECT["requires-python"] == f">=3.{first},<3.{last + 1}"
    assert f"(3, {first}) <= sys.version_info < (3, {last + 1})" in MAKEFILE
    assert f"3.{sys.version_info.minor}" in classified


def test_a_tree_that_is_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the libraries there, and its own code found only through the working directory."""
    assert services_are_found()
    with monkeypatch.context() as plain:
        plain.setattr(sys, "path", [str(ROOT), "/nowhere"])
        assert not services_are_found()
    monkeypatch.setattr("cli.serve.services_are_found", lambda: False)
    assert main(["serve", "--demo"]) == 2
    assert "Millrace is not installed, only its source is here: run `make serve`" in capsys.readouterr().err


@pytest.mark.system
def test_a_plain_tree_says_so_in_a_line() -> None:
    """Without the libraries, too."""
    command = [sys.executable, "-S", "-m", "cli.main", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("millrace: error: msgspec is not installed: run `make serve`")
    assert done.stderr.count("\n") == 1


@pytest.mark.system
def test_nobody_is_sent_to_a_package_of_somebody_else() -> None:
    """`millrace` on the package index is not this."""
    texts = {path: path.read_text(errors="replace") for path in files_of_the_repository() if path.suffix != ".lock"}
    assert len(texts) > 300
    sent = re.compile(r"pip3? (install|download)[^\n]*[ '\"`]millrace(\[| |'|\"|`|$|\n|=)")
    assert [str(path) for path, text in texts.items() if sent.search(text)] == []
    assert sent.search("pip install 'millrace[autoscaler]'")


def files_of_the_repository() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = (".py", ".md", ".toml", ".yaml", ".tpl", ".txt", ".Containerfile")
    return [ROOT / name for name in listed.splitlines() if name.endswith(texts) and name != "tests/test_package.py"]


def test_a_full_disk_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_room(_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/millrace-x")

    monkeypatch.setitem(COMMANDS, "serve", no_room)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == (
        "millrace serve: error: the disk has no room for /tmp/millrace-x: make room, or let temporary files go "
        "elsewhere (TMPDIR=/another/disk)\n"
    )


def test_what_only_a_card_runs_is_type_checked() -> None:
    """Else a call that has become wrong is seen late, by who has a card."""
    asking = {
        path.relative_to(ROOT)
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(r"cuda\.is_available|\bON_GPU\b", path.read_text())
    } - {Path("tests/test_package.py")}
    checked = [Path(path) for path in CONFIGURED["tool"]["mypy"]["files"]]
    assert Path("tests/engine/kernels/test_gpu_exchange.py") in asking
    assert [str(one) for one in sorted(asking) if not any(one.is_relative_to(path) for path in checked)] == []


def test_stale_calls_count_in_every_test_and_all_else_where_it_is_asked() -> None:
    strict = CONFIGURED["tool"]["mypy"]["files"]
    for file, code, expected in [
        ("tests/cli/test_cli_bench.py", "call-arg", True),
        ("tests/cli/test_cli_bench.py", "arg-type", False),
        ("tests/engine/kernels/test_gpu_exchange.py", "arg-type", True),
        ("shared/service.py", "arg-type", True),
    ]:
        assert type_check.counts({"file": file, "code": code}, strict) is expected


def test_each_conftest_is_type_checked_under_a_name_of_its_own(tmp_path: Path) -> None:
    for folder in ("tests", "tests/gateway", "tests/engine/model"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "conftest.py").write_text(folder)
    copies = type_check.copy_conftests(tmp_path)
    assert len({Path(copy).name for copy in copies}) == len(copies) == 3
    assert {(tmp_path / copy).read_text(): original for copy, original in copies.items()} == {
        folder: f"{folder}/conftest.py" for folder in ("tests", "tests/gateway", "tests/engine/model")
    }


@pytest.mark.system
def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "cli.main", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"millrace {MILLRACE_VERSION}\n"), done.stderr


@pytest.mark.system
def test_the_engine_needs_no_triton_on_a_cpu() -> None:
    """As where there are no wheels of it, on macOS."""
    script = """if True:
        import sys
        sys.modules["triton"] = None
        import services.engine.__main__ as engine
        from services.engine.run.assembly import sampling_ops
        print(engine.operations("cpu") and sampling_ops("rejection", on_gpu=False) and "without")
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "without\n"), done.stderr


# ------------------------------------------------------------------------------------------- make and its environment

# A Python that is fit, notes what else it is asked to do, and lends itself to the environments that it makes.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *"import ensurepip"*) exit {ensurepip} ;;
    *print*-venv*) echo python3.12-venv ;;
    -c*) ;;
    *"-m venv"*) echo "$*" >> {said}; mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
    *"config list"*) echo "{pip_config}" ;;
    *) echo "$*" >> {said}; {pip} ;;
esac
"""


class Tree:
    """A copy of what `make` reads, with a Python that does not install anything."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.python = directory / "python3"
        self.said = directory / "said"
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, directory)
        self.write_python()

    def write_python(self, path: Path | None = None, **how: str | int) -> None:
        """`how`: the exit status of `import ensurepip`, the answer of `pip config list`, what pip does."""
        path = path or self.python
        path.parent.mkdir(parents=True, exist_ok=True)
        default = {"said": self.said, "ensurepip": 0, "pip_config": "global.index-url='...'", "pip": "exit 3"}
        path.write_text(FAKE_PYTHON.format(**(default | how)))
        path.chmod(0o755)

    def make(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run make as from a shell: not as one within the make that runs these tests, whose variables it would take."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", *(words or ("serve", f"PYTHON={self.python}"))]
        return subprocess.run(
            command, cwd=self.directory, env=ours | environ, capture_output=True, text=True, timeout=PATIENCE_S
        )

    def asked(self) -> list[str]:
        return self.said.read_text().splitlines() if self.said.exists() else []


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.system
@pytest.mark.parametrize("named", [None, "/nowhere/python3.12", "false"])
def test_make_says_which_python_is_missing_and_what_to_do(tree: Tree, named: str | None) -> None:
    bin_directory = tree.directory / "bin"
    bin_directory.mkdir()
    for tool in ("make", "bash"):
        (bin_directory / tool).symlink_to(str(shutil.which(tool)))
    done = tree.make("serve", *([f"PYTHON={named}"] if named else []), PATH=str(bin_directory))
    said = done.stderr.splitlines()
    assert done.returncode == 2
    assert said[0].startswith(
        f"make: {f'{named} is not' if named else 'there is no'} Python of 3.11 3.12 3.13: install one"
    )
    assert "make PYTHON=/path/to/python3" in said[0]
    assert not (tree.directory / ".venv").exists()


@pytest.mark.system
def test_make_names_the_package_of_a_python_that_cannot_make_environments(tree: Tree) -> None:
    tree.write_python(ensurepip=1)
    done = tree.make()
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        f"make: {tree.python} lacks the modules that make environments: install them (apt install python3.12-venv), "
        "or name another: make PYTHON=/path/to/python3"
    )


@pytest.mark.system
def test_make_says_what_it_is_doing_while_pip_works(tree: Tree) -> None:
    said = ("Collecting redis", "  Downloading a/redis-8.whl (1.0 MB)", "Installing collected packages: redis")
    tree.write_python(pip="; ".join([*(f"echo '{line}'" for line in said), "exit 3"]))
    done = tree.make()
    assert done.returncode == 2
    assert "installing what `cli` needs into .venv" in done.stdout
    assert done.stdout.endswith("  collecting redis\n  fetching redis-8.whl (1.0 MB)\n  installing all of them\n")
    assert not (tree.directory / ".venv" / ".installed-cli").exists()


@pytest.mark.system
@pytest.mark.parametrize("broken", ["its Python has gone", "it was copied", "it was broken by something else"])
def test_make_makes_a_broken_environment_of_its_own_again(tree: Tree, broken: str) -> None:
    venv = tree.directory / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / ".installed-cli").write_text("/elsewhere\n" if broken == "it was copied" else "")
    if broken == "its Python has gone":
        (venv / "bin" / "python").symlink_to("/nowhere/python3.11")
    elif broken == "it was copied":
        tree.write_python(venv / "bin" / "python")
    done = tree.make()
    why = "it was made for /elsewhere" if broken == "it was copied" else "there is no Python in it that runs"
    assert f"make: making .venv again (as {why}) with {tree.python}" in done.stdout
    assert tree.asked()[0] == "-m venv --clear .venv"


@pytest.mark.system
def test_make_names_an_environment_that_is_somebody_elses_and_leaves_it(tree: Tree) -> None:
    theirs = tree.directory / ".venv" / "theirs"
    theirs.parent.mkdir()
    theirs.touch()
    done = tree.make()
    assert done.returncode == 2
    assert done.stderr.startswith("make: .venv cannot be used, as there is no Python in it that runs, and is not from")
    assert "make VENV=.venv-millrace" in done.stderr
    assert theirs.exists()
    assert tree.asked() == []


@pytest.mark.system
def test_make_says_that_the_disk_is_full(tree: Tree) -> None:
    (tree.directory / "bin").mkdir()
    df = tree.directory / "bin" / "df"
    df.write_text("#!/bin/bash\necho 'Filesystem 1024-blocks Used Available'\necho 'disk 9 9 102400 99% /'\n")
    df.chmod(0o755)
    done = tree.make(PATH=f"{df.parent}:{os.environ['PATH']}", TMPDIR="/tmp")
    assert done.returncode == 2
    assert "make: only 100 MB are free in .venv, and this needs up to 4000: make room" in done.stderr
    assert "make: only 100 MB are free in /tmp" in done.stderr


@pytest.mark.system
@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia*"))), reason="there is a GPU here")
@pytest.mark.parametrize("index_is_set", [False, True])
def test_a_machine_without_a_gpu_gets_torch_for_cpus_unless_pip_was_told_of_an_index(
    tree: Tree, index_is_set: bool
) -> None:
    tree.write_python(pip="exit 0", pip_config="global.extra-index-url='x'" if index_is_set else "global.timeout='9'")
    tree.make("TORCH_CPU_INDEX=https://cpu.example.com", "serve", f"PYTHON={tree.python}")
    (pin,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    from_cpu_index = [line for line in tree.asked() if "--index-url https://cpu.example.com" in line]
    assert len(from_cpu_index) == (not index_is_set)
    assert all(line.endswith(pin) for line in from_cpu_index)


@pytest.mark.system
def test_the_wheel_has_the_version_the_command_and_what_the_services_read(tmp_path: Path) -> None:
    """Its name is one that nobody else has on the package index."""
    wheels = pytest.importorskip("hatchling.builders.wheel")
    (made,) = wheels.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert Path(made).name == f"millrace_serving-{MILLRACE_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(made) as wheel:
        names = wheel.namelist()
        (entry_points,) = [wheel.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert "millrace = cli.main:main" in entry_points
    assert {"cli/demo_checkpoint/model.safetensors", "services/gateway/console/static/app.js"} <= set(names)
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {"cli", "services", "shared"}
