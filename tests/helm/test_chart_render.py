"""Every case of the matrix is linted, rendered and valid for the oldest, a common and the newest Kubernetes."""

import functools
import json

import jsonschema
import kubernetes_validate.utils as kubernetes
import pytest
import referencing
from helm_chart import CHART, CLAIM, MATRIX, NAMESPACE, SERVICES, Object, case, complaints, find, parse, render

from shared.version import MILLRACE_VERSION

VERSIONS = ("1.27", "1.31", "1.37")
# Kinds of other APIs, whose schemas are not Kubernetes's: `make test-chart` checks them against their own.
FOREIGN = {"ScaledObject", "TriggerAuthentication", "PodMonitor", "PrometheusRule", "HTTPRoute"}


@functools.cache
def definitions(version: str) -> referencing.Registry:
    contents = kubernetes.schema_contents(
        f"kubernetes-json-schema/v{full(version)}-local-strict/_definitions.json", version
    )
    return referencing.Resource.from_contents(contents) @ referencing.Registry()


@functools.cache
def full(version: str) -> str:
    return next(each for each in kubernetes.all_versions() if kubernetes.major_minor(each) == version)


@functools.cache
def validator(version: str, kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    """The package's own validation reads all of Kubernetes's schemas anew for every object."""
    group = api_version.replace(".authorization.k8s.io", "").replace(".k8s.io", "").replace("/", "-")
    name = f"kubernetes-json-schema/v{full(version)}-local-strict/{kind.lower()}-{group}.json"
    schema = kubernetes.schema_contents(name, version)
    return jsonschema.Draft202012Validator(
        schema, registry=referencing.Resource.from_contents(schema) @ definitions(version)
    )


def identity(item: Object) -> tuple[str, str, str]:
    return item["apiVersion"], item["kind"], item["metadata"]["name"]


@pytest.mark.parametrize("name", MATRIX)
def test_lint_has_nothing_against_it(name: str) -> None:
    assert complaints(MATRIX[name]) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(version: str) -> None:
    seen, problems = set(), []
    for name in MATRIX:
        for item in case(name):
            text = json.dumps(item, sort_keys=True)
            if item["kind"] in FOREIGN or text in seen:
                continue
            seen.add(text)
            errors = validator(version, item["kind"], item["apiVersion"]).iter_errors(item)
            problems += [f"{identity(item)} {error.json_path}: {error.message}" for error in errors]
    assert problems == []
    assert len(seen) > 50


@pytest.mark.parametrize("version", VERSIONS)
def test_validation_finds_a_planted_error(version: str) -> None:
    deployment = json.loads(json.dumps(find(case("defaults"), "Deployment", "millrace-engine")))
    deployment["spec"]["template"]["spec"]["containers"][0]["port"] = 1
    assert not validator(version, "Deployment", "apps/v1").is_valid(deployment)


@pytest.mark.parametrize("name", MATRIX)
def test_names_are_unique_and_belong_to_the_release(name: str) -> None:
    names = [identity(item) for item in case(name)]
    assert len(names) == len(set(names))
    for item in case(name):
        assert item["metadata"]["name"].startswith("millrace")
        assert len(item["metadata"]["name"]) <= 63
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == "millrace"


def test_two_releases_share_nothing() -> None:
    one, other = (
        {identity(item) for item in parse(render(MATRIX["defaults"], name))} for name in ("millrace", "second")
    )
    assert not one & other
    assert {name.split("-")[0] for _, _, name in other} == {"second"}


def test_the_matrix_reaches_every_template() -> None:
    rendered = {path for values in MATRIX.values() for path, text in render(values).items() if text.strip()}
    templates = {
        str(path.relative_to(CHART)) for path in (CHART / "templates").rglob("*") if path.suffix in (".yaml", ".txt")
    }
    assert templates - rendered == {"templates/replicas.yaml"}, "test_chart_ownership.py renders it"


def test_ports_say_their_protocol() -> None:
    """Helm 4 applies server-side, where a default that the server added is in the way of the next upgrade."""
    for name in MATRIX:
        for item in case(name):
            for path, port in ports(item):
                assert port.get("protocol") in ("TCP", "UDP"), (identity(item), path)


def ports(item: object, path: str = "") -> list[tuple[str, Object]]:
    found = []
    if isinstance(item, dict):
        for key, value in item.items():
            if key == "ports" and isinstance(value, list):
                found += [(path, port) for port in value]
            found += ports(value, f"{path}.{key}")
    elif isinstance(item, list):
        for value in item:
            found += ports(value, path)
    return found


def test_a_services_template_is_the_next_ones_but_for_its_own() -> None:
    """Same blocks in the same order, so that a diff between two is the difference between two services."""

    def skeleton(service: str) -> list[str]:
        text = (CHART / "templates" / f"{service.replace('_', '-')}.yaml").read_text()
        return [line.strip() for line in text.splitlines() if line.strip()]

    common = [line for line in skeleton("postproc") if "postproc" not in line]
    for service in SERVICES:
        lines = iter(skeleton(service))
        probes = [line for line in common if "leaseProbes" not in line and "millrace.scaler" not in line]
        missing = [line for line in probes if not any(line == other for other in lines)]
        assert missing == [], service


def test_the_chart_has_the_projects_version() -> None:
    import yaml

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == MILLRACE_VERSION


def test_notes_say_how_to_ask() -> None:
    notes = render(MATRIX["fetched model, keda, monitoring, tls"])["templates/NOTES.txt"]
    assert "URL=https://chat.example.com" in notes
    assert "get secret millrace-api-keys" in notes
    assert f"--namespace {NAMESPACE}" in notes
    assert "Everybody" not in notes
    assert "Everybody" in render(MATRIX["defaults"])["templates/NOTES.txt"]
    assert "may end answers" in render(MATRIX["external redis with users, hpa, placement"])["templates/NOTES.txt"]
    assert (
        "Millrace serves ernie." in render(MATRIX["external redis with users, hpa, placement"])["templates/NOTES.txt"]
    )
    assert "keeps nothing" in render(MATRIX["cpu, nothing kept, no policies"])["templates/NOTES.txt"]
    assert "Pod Security" in render(MATRIX["cpu, nothing kept, no policies"])["templates/NOTES.txt"]
    plain = render(CLAIM)["templates/NOTES.txt"]
    assert not [word for word in ("One gateway", "Pod Security", "are idle") if word in plain]
    assert "rollout restart" in render({**CLAIM, "gateway": {"replicas": 1}})["templates/NOTES.txt"]
