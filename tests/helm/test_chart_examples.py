"""The values files in helm/examples/: what each says is valid, and gives what its first line promises."""

import functools

import pytest
import yaml
from helm_chart import CHART, Object, complaints, container, environment, find, objects, pods
from test_chart_render import FOREIGN, validator

NAMES = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))


@functools.cache
def example(name: str) -> list[Object]:
    return objects(yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text()))


def test_there_are_five() -> None:
    assert NAMES == ["air-gapped", "external-redis", "ingress-with-keys", "many-engines", "one-gpu"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_valid(name: str) -> None:
    assert complaints(yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())) == []
    for item in example(name):
        if item["kind"] not in FOREIGN:
            assert list(validator("1.31", item["kind"], item["apiVersion"]).iter_errors(item)) == []


def test_one_gpu_is_asked_for_once() -> None:
    asking = [spec for _, spec in pods(example("one-gpu")).values() if "nvidia.com/gpu" in str(spec["containers"])]
    assert [container(spec)["name"] for spec in asking] == ["engine"]


def test_many_engines_are_scaled_by_keda() -> None:
    scaler = find(example("many-engines"), "ScaledObject", "millrace-engine")["spec"]
    assert (scaler["minReplicaCount"], scaler["maxReplicaCount"]) == (0, 16)


def test_an_external_redis_is_the_only_one() -> None:
    assert "redis" not in pods(example("external-redis"))
    assert environment(example("external-redis"), "engine")["MILLRACE_REDIS_URL"]["secretKeyRef"]["key"] == "engine"


def test_the_ingress_is_the_only_way_in_and_asks_for_keys() -> None:
    made = example("ingress-with-keys")
    assert find(made, "Ingress")["spec"]["tls"] == [{"secretName": "chat-example-com", "hosts": ["chat.example.com"]}]
    assert "MILLRACE_API_KEYS" in environment(made, "gateway")


def test_nothing_is_fetched_from_outside_an_air_gap() -> None:
    made = example("air-gapped")
    for _, spec in pods(made).values():
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            assert each["image"].startswith("registry.internal.example.com/")
    model = find(made, "NetworkPolicy", "millrace-model")["spec"]["egress"]
    assert model == [{"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}]}]
