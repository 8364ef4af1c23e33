"""Each stage is scaled by the length of its own stream, and only ever by draining what is taken away."""

import pytest
from helm_chart import CLAIM, SERVICES, Object, case, find, objects, secret_data

from shared.keys import ENCODE, GENERATE, Keys

KEDA = "fetched model, keda, monitoring, tls"
HPA = "external redis with users, hpa, placement"


def trigger(name: str, component: str) -> Object:
    (only,) = find(case(name), "ScaledObject", f"millrace-{component}")["spec"]["triggers"]
    return only


@pytest.mark.parametrize(("component", "stream", "target"), [("mm-encoder", ENCODE, "8"), ("engine", GENERATE, "32")])
def test_keda_counts_waiting_and_running_work(component: str, stream: str, target: str) -> None:
    metadata = trigger(KEDA, component)["metadata"]
    assert metadata["stream"] == Keys("models.millrace").stream(stream)
    assert metadata["streamLength"] == target
    assert metadata["activationLagCount"] == "0"
    assert not {"consumerGroup", "pendingEntriesCount", "lagCount"} & metadata.keys(), "these do not see all work"
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["address"] == "millrace-redis.models.svc:6379"


def test_a_stage_may_sleep_and_the_ends_of_the_pipeline_may_not() -> None:
    least = {
        item["metadata"]["name"].removeprefix("millrace-"): item["spec"]["minReplicaCount"]
        for item in case(KEDA)
        if item["kind"] == "ScaledObject"
    }
    assert least == {"gateway": 2, "mm-encoder": 0, "engine": 0, "postproc": 2}
    assert trigger(KEDA, "gateway")["type"] == trigger(KEDA, "postproc")["type"] == "cpu"


def test_keda_signs_in_as_the_user_that_may_only_count() -> None:
    auth = find(case(KEDA), "TriggerAuthentication")
    told = {each["parameter"]: (each["name"], each["key"]) for each in auth["spec"]["secretTargetRef"]}
    assert told["username"] == ("millrace-redis", "scaler-username")
    assert told["password"] == ("millrace-redis", "scaler-password")
    assert trigger(KEDA, "engine")["authenticationRef"] == {"name": auth["metadata"]["name"]}
    assert {"scaler-username", "scaler-password"} <= secret_data(case(KEDA), "millrace-redis").keys()
    assert "authenticationRef" not in trigger("external redis, open", "engine")


def test_an_external_redis_is_counted_in_its_database() -> None:
    values = {**CLAIM, "autoscaling": {"kind": "keda"}, "redis": {"external": {"url": "rediss://redis:6380/3"}}}
    (only,) = find(objects(values), "ScaledObject", "millrace-engine")["spec"]["triggers"]
    told = {key: only["metadata"][key] for key in ("address", "databaseIndex", "enableTLS")}
    assert told == {"address": "redis:6380", "databaseIndex": "3", "enableTLS": "true"}


def test_the_hpa_reads_what_the_podmonitor_labels() -> None:
    (metric,) = find(case(HPA), "HorizontalPodAutoscaler", "millrace-engine")["spec"]["metrics"]
    assert metric["external"]["metric"] == {
        "name": "redis_stream_length",
        "selector": {"matchLabels": {"stage": "generate", "app_kubernetes_io_instance": "millrace"}},
    }
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "32"}
    (endpoint,) = [
        each
        for each in find(case(KEDA), "PodMonitor")["spec"]["podMetricsEndpoints"]
        if each["port"] == "redis-metrics"
    ]
    assert endpoint["metricRelabelings"][0]["targetLabel"] == "stage"


@pytest.mark.parametrize("name", [KEDA, HPA])
@pytest.mark.parametrize("service", SERVICES)
def test_one_scaler_has_the_only_word_on_replicas(name: str, service: str) -> None:
    component = service.replace("_", "-")
    deployment = find(case(name), "Deployment", f"millrace-{component}")
    assert "replicas" not in deployment["spec"], "an upgrade would undo the scaler's last decision"
    scalers = [
        item["spec"]
        for item in case(name)
        if item["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")
        and item["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    ]
    (scaler,) = scalers
    behavior = scaler.get("behavior") or scaler["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 60}]


def test_without_a_scaler_the_values_say_how_many() -> None:
    made = objects({**CLAIM, "engine": {"replicas": 3}})
    assert find(made, "Deployment", "millrace-engine")["spec"]["replicas"] == 3
    assert not {item["kind"] for item in made} & {"ScaledObject", "HorizontalPodAutoscaler", "TriggerAuthentication"}


def test_somebody_elses_decisions_are_left_alone() -> None:
    made = objects({**CLAIM, "autoscaling": {"kind": "external"}})
    assert all("replicas" not in item["spec"] for item in made if item["kind"] == "Deployment")
    assert not {item["kind"] for item in made} & {"ScaledObject", "HorizontalPodAutoscaler"}
