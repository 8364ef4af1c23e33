"""docs/operations.md: every command and every block of values in it, as far as that can be judged without a cluster."""

import functools
import re
import shlex
from itertools import pairwise

import pytest
import yaml
from helm_chart import CHART, CLAIM, MATRIX, ROOT, Object, Values, case, objects, pods, render
from test_chart_values import defaults, merged

pytestmark = pytest.mark.slow  # many renderings
PAGE = (ROOT / "docs" / "operations.md").read_text()
NAMESPACED = ("logs", "delete", "get", "patch", "rollout", "port-forward", "scale")
# Verbs of kubectl that the page uses, and how many words come before the object.
VERBS = {"logs": 1, "delete": 1, "get": 1, "patch": 1, "rollout": 2, "port-forward": 1, "cordon": 1, "drain": 1}


def blocks() -> list[str]:
    """Return the indented blocks of the page, without their indent."""
    found: list[list[str]] = [[]]
    for before, line in pairwise(["", *PAGE.splitlines(), ""]):
        if line.startswith("    ") and (found[-1] or not before.strip()):
            found[-1].append(line.removeprefix("    "))
        elif found[-1] and line.strip():
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


def commands() -> list[str]:
    """Return the page's commands, each on one line, without the shell's loops, assignments and redirections."""
    found = []
    for block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.strip()).partition(" | ")[0]
            command = re.sub(r"(\s*(&|> \S+))$", "", command)
            if command.split(" ")[0] in ("kubectl", "helm", "docker", "millrace"):
                found.append(command)
    return found


def value_blocks() -> list[Values]:
    found = [yaml.safe_load(block) for block in blocks() if re.match(r"\w+:", block)]
    return [each for each in found if isinstance(each, dict)]


@functools.cache
def everything() -> list[Object]:
    return [item for name in MATRIX for item in case(name)] + objects({"model": {"download": {"repository": "a/b"}}})


def names(kind: str) -> set[str]:
    made = {item["metadata"]["name"] for item in everything() if item["kind"].lower() == kind}
    if kind == "persistentvolumeclaim":
        for item in everything():
            for template in item["spec"].get("volumeClaimTemplates", []) if item["kind"] == "StatefulSet" else []:
                made.add(f"{template['metadata']['name']}-{item['metadata']['name']}-0")
    return made


def complaint(command: str) -> str | None:
    """Return what is wrong with a command, or None."""
    words = shlex.split(command)
    return {"kubectl": kubectl, "helm": helm, "docker": docker, "millrace": millrace}[words[0]](words[1:])


def kubectl(words: list[str]) -> str | None:
    if words[0] not in VERBS:
        return f"kubectl has no {words[0]}"
    if words[0] in NAMESPACED and option(words, "--namespace") != "models":
        return "it says no namespace, or another than the page"
    if selector := option(words, "--selector"):
        wanted = dict(pair.split("=") for pair in selector.split(",")).items()
        labelled = [*everything(), *({"metadata": pod} for pod, _ in download_pods().values())]
        if not any(wanted <= item["metadata"].get("labels", {}).items() for item in labelled):
            return f"nothing has the labels {selector}"
        return None
    target = words[VERBS[words[0]] :]
    if words[0] in ("cordon", "drain"):
        return None if target[0] == "NODE" else "not a node"
    kind, name = target[0].split("/") if "/" in target[0] else (target[0], target[1])
    if name not in names(kind):
        return f"there is no {kind} {name}"
    if (wanted_container := option(words, "--container")) and wanted_container not in containers():
        return f"no container is called {wanted_container}"
    return None


@functools.cache
def download_pods() -> dict[str, tuple[Object, Object]]:
    return pods(objects({"model": {"download": {"repository": "a/b"}}}))


def containers() -> set[str]:
    return {
        each["name"]
        for _, spec in download_pods().values()
        for each in [*spec["containers"], *spec.get("initContainers", [])]
    }


def helm(words: list[str]) -> str | None:
    if words[0] in ("install", "upgrade") and (ROOT / words[2]).resolve() != CHART:
        return f"{words[2]} is not the chart"
    if option(words, "--namespace") != "models":
        return "it says no namespace, or another than the page"
    told: Values = {}
    for flag, text in pairwise(words):
        if flag == "--set":
            told = merged(told, parsed(text))
    render(told if told.get("model") else merged(CLAIM, told))  # fails if the schema refuses it
    return None


def parsed(text: str) -> Values:
    """Return what --set of Helm makes of a text."""
    path, _, value = text.partition("=")
    made = value[1:-1].split(",") if value.startswith("{") else yaml.safe_load(value)
    for key in reversed(path.split(".")):
        made = {key: made}
    return made


def docker(words: list[str]) -> str | None:
    if words[0] == "push":
        return None
    files = sorted((CHART / "images").glob("*.Containerfile"))
    wanted = str(option(words, "-f")).replace("$service", "gateway")
    if ROOT / wanted not in files:
        return f"{wanted} is not there"
    stage = option(words, "--target")
    return None if stage is None or f" AS {stage}" in (ROOT / wanted).read_text() else f"no stage {stage}"


def millrace(words: list[str]) -> str | None:
    text = "".join((ROOT / "cli" / f"{name}.py").read_text() for name in ("main", "connection", words[0]))
    missing = [word for word in words if word.startswith("--") and f'"{word}"' not in text]
    return f"{words[0]} has no {missing}" if missing else None


def option(words: list[str], name: str) -> str | None:
    """Return an option's value, said as one word or as two."""
    for word, after in pairwise([*words, ""]):
        if word == name:
            return after
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


@pytest.mark.parametrize("command", commands())
def test_a_command_names_what_there_is(command: str) -> None:
    assert complaint(command) is None


def test_the_commands_are_found() -> None:
    assert len(commands()) > 20
    assert {command.split(" ")[0] for command in commands()} == {"kubectl", "helm", "docker", "millrace"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "kubectl rollout restart deployment/millrace-motor --namespace models",
            "there is no deployment millrace-motor",
        ),
        ("kubectl logs deployment/millrace-engine", "no namespace"),
        ("kubectl logs deployment/millrace-engine --namespace models --container w", "no container"),
        ("kubectl get pod --namespace models --selector app.kubernetes.io/component=x", "nothing has the labels"),
        ("helm upgrade millrace ./chart --namespace models", "is not the chart"),
        ("docker build -f helm/images/motor.Containerfile .", "is not there"),
        ("millrace top --redis redis://r", "has no"),
    ],
)
def test_a_command_that_is_wrong_is_found(command: str, said: str) -> None:
    assert said in str(complaint(command))


def test_the_values_are_the_charts() -> None:
    assert len(value_blocks()) >= 2
    for values in value_blocks():
        assert values.keys() <= defaults().keys()
        assert render(merged(CLAIM, values))


def test_what_is_set_by_name_in_the_text_is_a_value() -> None:
    """`engine.surge=1` and the like, outside of commands."""
    told = re.findall(r"`(?:--set )?((?:\w+\.)+\w+)=([\w]+)`", PAGE)
    assert len(told) > 4
    for path, value in told:
        render(merged(CLAIM, parsed(f"{path}={value}")))
