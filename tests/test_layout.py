"""The repository's boundaries, read from its syntax trees: who may import whom, and what nobody may call.

Every rule is tried twice: on this repository, where it must find nothing, and on a small tree with one planted
violation, where it must find that.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
from machine import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent
CODE = ("shared", "services", "cli", "benchmarks")
SERVICES = ("gateway", "mm_encoder", "engine", "postproc")
TOP_LEVEL = {
    *CODE,
    *("tests", "docs", "helm"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"),
    *("Makefile", "pyproject.toml", "constraints.txt"),
}
BRINGS_TORCH = ("torch", "torchvision", "transformers", "safetensors.torch", "triton")
UNPICKLERS = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
RUNS_TEXT = ("eval", "exec", "compile", "__import__")
BUILDS_CLIENTS = ("Redis", "StrictRedis", "RedisCluster", "Sentinel", "from_url", "ConnectionPool")

PURE_ROOMS = ("services.gateway.request", "services.engine.schedule", "services.postproc.text")
QUESTION_WORDS = ("What", "Who", "How", "Whether", "Which", "When", "Where", "Whose", "Why")
HANDFUL = 5
DOCSTRINGS = "\n".join(f'def f{n}():\n    """What comes."""' for n in range(HANDFUL + 1))

Modules = dict[str, ast.Module]


def read_tree(root: Path) -> Modules:
    """Every module of the code under `root`, by dotted name; a package goes by its directory's name."""
    modules = {}
    for top in CODE:
        for path in sorted((root / top).rglob("*.py")):
            parts = list(path.relative_to(root).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            modules[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return modules


@cache
def repository() -> Modules:
    """Return this repository's modules."""
    return read_tree(ROOT)


def imports(module: ast.Module) -> Iterator[str]:
    """Dotted names a module imports anywhere in it; `from a import b` gives `a.b`, whatever b is."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    """Whether `name` is one of `packages` or lies inside one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def direct(modules: Modules, importer: Callable[[str], bool], forbidden: Callable[[str, str], bool]) -> list[str]:
    """`importer -> imported` for each import that is forbidden."""
    return [
        f"{name} -> {imported}"
        for name, module in modules.items()
        if importer(name)
        for imported in dict.fromkeys(imports(module))
        if forbidden(name, imported)
    ]


def reaches(modules: Modules, brings: tuple[str, ...], *starts: str) -> list[str]:
    """Return chains of imports, through our own modules, from one of `starts` to one of the libraries `brings`."""
    found, seen = [], set()
    paths = [[name] for name in modules if within(name, *starts)]
    while paths:
        path = paths.pop()
        if path[-1] in seen:
            continue
        seen.add(path[-1])
        for imported in dict.fromkeys(imports(modules[path[-1]])):
            if within(imported, *brings):
                found.append(" -> ".join([*path, imported]))
            else:
                paths.extend([*path, name] for name in (imported, imported.rpartition(".")[0]) if name in modules)
    return found


def calls(module: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call as (the called name as written: `f`, `a.b.f`), with its node."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# ------------------------------------------------------------------------------------------------------------ rules


def imports_are_absolute(modules: Modules) -> list[str]:
    """The other rules read names as written."""
    return [
        f"{name}: {ast.unparse(node)}"
        for name, module in modules.items()
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def services_stand_alone(modules: Modules) -> list[str]:
    def another_service(name: str, imported: str) -> bool:
        own = ".".join(name.split(".")[:2])
        return within(imported, *(f"services.{s}" for s in SERVICES)) and not within(imported, own)

    return direct(modules, lambda name: within(name, "services"), another_service)


def shared_stands_below(modules: Modules) -> list[str]:
    return direct(
        modules,
        lambda name: within(name, "shared"),
        lambda _, imported: within(imported, "services", "cli", "benchmarks", "tests"),
    )


def services_stand_below_the_cli(modules: Modules) -> list[str]:
    return direct(
        modules,
        lambda name: within(name, "services"),
        lambda _, imported: within(imported, "cli", "benchmarks", "tests"),
    )


def torch_in_shared_is_the_checkpoint_reader(modules: Modules) -> list[str]:
    readers = [f"shared.model.{name}" for name in ("checkpoint", "drawn_weights", "stored_integers", "tensor_source")]
    return direct(
        modules,
        lambda name: within(name, "shared") and name not in readers,
        lambda _, imported: within(imported, *BRINGS_TORCH, *readers),
    )


def light_services_never_reach_torch(modules: Modules) -> list[str]:
    return reaches(modules, BRINGS_TORCH, "services.gateway", "services.postproc")


def pure_rooms_reach_neither_torch_nor_redis(modules: Modules) -> list[str]:
    """The rooms that decide: they are tested with plain values."""
    return reaches(modules, (*BRINGS_TORCH, "redis", "valkey"), *PURE_ROOMS)


def pure_rooms_never_wait(modules: Modules) -> list[str]:
    return direct(
        modules,
        lambda name: within(name, *PURE_ROOMS),
        lambda _, imported: within(imported, "asyncio", "threading", "socket", "httpx"),
    )


def timeouts_do_not_swallow_cancellations(modules: Modules) -> list[str]:
    """asyncio.wait_for does, on Python 3.11, when what it awaits is done at that moment; asyncio.timeout does not."""
    return [
        f"{name}: {called}(...)"
        for name, module in modules.items()
        for called, _ in calls(module)
        if called in ("asyncio.wait_for", "wait_for")
    ]


def docstrings_open_with_a_verb_or_a_noun(modules: Modules) -> list[str]:
    """A docstring that opens with a question word has no subject. A handful may read better so."""
    found = [
        f"{name}: {text.splitlines()[0]}"
        for name, module in modules.items()
        for node in ast.walk(module)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if (text := ast.get_docstring(node)) and text.split()[0] in QUESTION_WORDS
    ]
    return found if len(found) > HANDFUL else []


def kernels_know_no_engine(modules: Modules) -> list[str]:
    kernels = "services.engine.kernels"
    return direct(
        modules,
        lambda name: within(name, kernels),
        lambda _, imported: within(imported, "services") and not within(imported, kernels),
    )


def clients_come_from_the_bus(modules: Modules) -> list[str]:
    """Benchmarks look on from outside and may bring a client of their own."""
    return [
        f"{name}: {called}(...)"
        for name, module in modules.items()
        if name != "shared.bus.client" and not within(name, "benchmarks")
        if any(within(imported, "redis", "valkey") for imported in imports(module))
        for called, _ in calls(module)
        if called.rsplit(".", 1)[-1] in BUILDS_CLIENTS
    ]


def nothing_runs_data(modules: Modules) -> list[str]:
    found = direct(modules, lambda _: True, lambda _, imported: within(imported, *UNPICKLERS))
    for name, module in modules.items():
        for called, node in calls(module):
            loads = called in ("torch.load", "torch.jit.load", "torch.hub.load", "pandas.read_pickle")
            unpickles = any(keyword.arg in ("allow_pickle", "trust_remote_code") for keyword in node.keywords)
            if called in RUNS_TEXT or loads or unpickles:
                found.append(f"{name}: {called}(...)")
    return found


def configuration_is_read_at_the_root(modules: Modules) -> list[str]:
    """Services and `shared` take settings as values; only a `__main__` looks at the environment.

    The exception asks for the one variable by which prometheus-client itself is told of its directory.
    """
    return [
        f"{name}: {ast.unparse(node)}"
        for name, module in modules.items()
        if within(name, "services", "shared") and not name.endswith(".__main__") and name != "shared.metrics"
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    ]


RULES = [
    imports_are_absolute,
    services_stand_alone,
    shared_stands_below,
    services_stand_below_the_cli,
    torch_in_shared_is_the_checkpoint_reader,
    light_services_never_reach_torch,
    pure_rooms_reach_neither_torch_nor_redis,
    pure_rooms_never_wait,
    timeouts_do_not_swallow_cancellations,
    docstrings_open_with_a_verb_or_a_noun,
    kernels_know_no_engine,
    clients_come_from_the_bus,
    nothing_runs_data,
    configuration_is_read_at_the_root,
]

PLANTED = [
    (imports_are_absolute, "services/engine/loop/engine.py", "from ..gateway import app"),
    (services_stand_alone, "services/gateway/http/app.py", "from services.engine.schedule.scheduler import Scheduler"),
    (services_stand_alone, "services/gateway/http/app.py", "def f():\n    import services.postproc"),
    (services_stand_alone, "services/gateway/http/app.py", "from services import engine"),
    (shared_stands_below, "shared/bus/keys.py", "import services.gateway.http.app"),
    (shared_stands_below, "shared/bus/keys.py", "from cli import main"),
    (services_stand_below_the_cli, "services/engine/loop/engine.py", "from cli.flags import parse"),
    (torch_in_shared_is_the_checkpoint_reader, "shared/bus/keys.py", "import torch.nn as nn"),
    (torch_in_shared_is_the_checkpoint_reader, "shared/bus/keys.py", "from shared.model.checkpoint import Checkpoint"),
    (light_services_never_reach_torch, "services/postproc/worker.py", "from torch import Tensor"),
    (light_services_never_reach_torch, "services/postproc/worker.py", "from shared import weights"),
    (
        pure_rooms_reach_neither_torch_nor_redis,
        "services/engine/schedule/scheduler.py",
        "from services.engine.schedule.blocks import Pool",
    ),
    (pure_rooms_reach_neither_torch_nor_redis, "services/gateway/request/parsed.py", "from redis.asyncio import Redis"),
    (pure_rooms_reach_neither_torch_nor_redis, "services/postproc/text/stop.py", "from shared.bus import client"),
    (pure_rooms_never_wait, "services/postproc/text/stop.py", "import asyncio"),
    (timeouts_do_not_swallow_cancellations, "services/gateway/http/app.py", "import asyncio\nasyncio.wait_for(x, 1)"),
    (docstrings_open_with_a_verb_or_a_noun, "shared/bus/keys.py", DOCSTRINGS),
    (
        kernels_know_no_engine,
        "services/engine/kernels/reference/moe.py",
        "from services.engine.model.inputs import StepInput",
    ),
    (kernels_know_no_engine, "services/engine/kernels/reference/moe.py", "from services.engine import model"),
    (clients_come_from_the_bus, "services/gateway/http/app.py", "from redis.asyncio import Redis\nr = Redis()"),
    (clients_come_from_the_bus, "cli/serve.py", "import redis\nr = redis.Redis.from_url('redis://x')"),
    (nothing_runs_data, "shared/bus/keys.py", "import pickle"),
    (nothing_runs_data, "shared/bus/keys.py", "x = eval('1')"),
    (nothing_runs_data, "services/engine/loop/engine.py", "import torch\nx = torch.load('f')"),
    (nothing_runs_data, "services/engine/loop/engine.py", "import numpy\nx = numpy.load('f', allow_pickle=True)"),
    (configuration_is_read_at_the_root, "services/engine/loop/engine.py", "import os\nx = os.environ['X']"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps(rule: Callable[[Modules], list[str]]) -> None:
    assert rule(repository()) == []


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_violation_is_found(
    tmp_path: Path, rule: Callable[[Modules], list[str]], path: str, text: str
) -> None:
    clean = {
        "shared/__init__.py": "",
        "shared/bus/keys.py": "",
        "shared/bus/client.py": "from redis.asyncio import Redis\nclient = Redis()",
        "shared/model/checkpoint.py": "import torch",
        "shared/weights.py": "from shared.model.checkpoint import Checkpoint" if "weights" in text else "",
        "services/gateway/http/app.py": "import os.path\nfrom shared.bus.keys import x",
        "services/gateway/__main__.py": "import os\nx = os.environ",
        "services/postproc/worker.py": "from services.postproc import stop",
        "services/engine/__init__.py": "",
        "services/engine/loop/engine.py": "import re, torch\nx = re.compile('a')",
        "services/engine/schedule/scheduler.py": "import heapq",
        "services/engine/schedule/blocks.py": "import torch" if "blocks" in text else "",
        "services/engine/kernels/__init__.py": "",
        "services/engine/kernels/reference/moe.py": "import torch\nfrom services.engine.kernels import reference",
        "services/gateway/request/parsed.py": "from shared.bus.keys import x",
        "services/postproc/text/stop.py": "",
        "cli/serve.py": "from services.gateway import app",
    }
    for name, source in clean.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    if "weights" not in text and "blocks" not in text:
        assert rule(read_tree(tmp_path)) == []
    (tmp_path / path).write_text(text)
    assert rule(read_tree(tmp_path)) != []


def test_the_top_level_is_what_the_map_says() -> None:
    """Besides what git ignores, and what tools keep in directories of their own with a dot."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    names = {entry.name for entry in ROOT.iterdir() if not any(fnmatch(entry.name, rule) for rule in ignored)}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("document", ["README.md", "docs/design.md", "docs/checkpoint.md"])
def test_documents_name_files_that_are_there(document: str) -> None:
    """By their path, or by their name where the path before it says whose they are."""
    names = set(re.findall(r"`([\w./]+\.py)`", (ROOT / document).read_text()))
    ours = {path.relative_to(ROOT).as_posix() for top in CODE for path in (ROOT / top).rglob("*.py")}
    assert names
    assert {name for name in names if not any(path == name or path.endswith("/" + name) for path in ours)} <= {
        "tests/test_layout.py"
    }


def test_services_are_the_four() -> None:
    assert {path.name for path in (ROOT / "services").iterdir() if path.name != "__pycache__"} == set(SERVICES)


@pytest.mark.system
@pytest.mark.parametrize("service", ["gateway", "postproc"])
def test_a_running_light_service_has_no_torch(service: str) -> None:
    """The syntax tree sees our own imports; this sees what the libraries pull in."""
    script = f"import sys, services.{service}.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
