"""Each stage is scaled by the length of its own stream, and only ever by draining what is taken away."""

import math
import re

import pytest
from helm_chart import CLAIM, MATRIX, SERVICES, Object, case, environment, find, objects, pods, secret_data
from prometheus_client.parser import text_string_to_metric_families

from cli.autoscaler.policy import Rules
from cli.autoscaler.settings import AutoscalerSettings, load
from services.mm_encoder.settings import MmEncoderSettings
from shared.bus.keys import ENCODE, GENERATE, Keys

KEDA = "fetched model, keda, monitoring, tls"
HPA = "external redis with users, hpa, placement"
BUILTIN = "autoscaler of its own"
PLACES = str(MmEncoderSettings(redis_url="", model="").concurrency)  # batches are full where these are


def trigger(name: str, component: str) -> Object:
    (only,) = find(case(name), "ScaledObject", f"millrace-{component}")["spec"]["triggers"]
    return only


@pytest.mark.parametrize(
    ("component", "stream", "target"), [("mm-encoder", ENCODE, PLACES), ("engine", GENERATE, "32")]
)
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


@pytest.mark.parametrize(
    ("url", "addresses", "database", "tls"),
    [
        ("redis+sentinel://s0:26380,s1/main/3", "s0:26380,s1:26379", "3", "false"),
        ("rediss+sentinel://s0/main?x=y", "s0:26379", "0", "true"),
    ],
)
def test_a_redis_behind_sentinels_is_counted_at_its_primary(url: str, addresses: str, database: str, tls: str) -> None:
    values = {**CLAIM, "autoscaling": {"kind": "keda"}, "redis": {"external": {"url": url}}}
    (only,) = find(objects(values), "ScaledObject", "millrace-engine")["spec"]["triggers"]
    assert only["type"] == "redis-sentinel-streams"
    told = {key: only["metadata"][key] for key in ("addresses", "sentinelMaster", "databaseIndex", "enableTLS")}
    assert told == {"addresses": addresses, "sentinelMaster": "main", "databaseIndex": database, "enableTLS": tls}


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


def autoscaler(items: list[Object] | tuple[Object, ...], redis_url: str = "redis://r") -> AutoscalerSettings:
    """Read the pod's environment as the autoscaler does."""
    fields = {"metadata.name": "pod-0", "metadata.namespace": "models"}
    told = {}
    for name, value in environment(items, "autoscaler").items():
        if isinstance(value, str):
            told[name] = value
        else:
            told[name] = fields[value["fieldRef"]["fieldPath"]] if "fieldRef" in value else redis_url
    return load(told)


def test_the_autoscaler_understands_what_it_is_told() -> None:
    told = autoscaler(case(BUILTIN))
    assert told.stages == {
        "mm_encoder": Rules(deployment="millrace-mm-encoder", target=16, least=1, most=4, cooldown_s=120),
        "engine": Rules(deployment="millrace-engine", target=64, least=0, most=4, cooldown_s=120),
    }
    deployments = {item["metadata"]["name"] for item in case(BUILTIN) if item["kind"] == "Deployment"}
    assert {rules.deployment for rules in told.stages.values()} <= deployments
    assert (told.kube_namespace, told.namespace, told.name) == ("models", "models.millrace", "pod-0")
    assert (told.metrics_port, told.log_level) == (8181, "debug")


def test_the_autoscaler_looks_at_any_redis() -> None:
    """One with users, one without, and never the second one for media."""
    made = objects({**MATRIX[HPA], "autoscaling": {"kind": "builtin"}})
    assert environment(made, "autoscaler")["MILLRACE_REDIS_URL"] == {
        "secretKeyRef": {"name": "redis-users", "key": "autoscaler"}
    }
    assert autoscaler(made, "rediss://u:p@redis.example.com:6380/2").redis_url.endswith("/2")
    made = objects({**MATRIX["external redis, open"], "autoscaling": {"kind": "builtin"}})
    assert autoscaler(made).redis_url == "redis://redis:6379"


def test_the_ends_of_the_pipeline_are_scaled_by_cpu_beside_the_autoscaler() -> None:
    least = {
        item["spec"]["scaleTargetRef"]["name"]: (item["spec"]["minReplicas"], item["spec"]["metrics"][0]["type"])
        for item in case(BUILTIN)
        if item["kind"] == "HorizontalPodAutoscaler"
    }
    assert least == {"millrace-gateway": (2, "Resource"), "millrace-postproc": (2, "Resource")}
    for service in SERVICES:
        deployment = find(case(BUILTIN), "Deployment", f"millrace-{service.replace('_', '-')}")
        assert "replicas" not in deployment["spec"], "an upgrade would undo the scaler's last decision"


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


# What the exporter in Valkey's pod answers, recorded from it, of which one line is the engine's stream.
RECORDED = """\
# TYPE redis_stream_length gauge
redis_stream_length{db="db0",stream="models.millrace:encode"} 3
redis_stream_length{db="db0",stream="models.millrace:generate"} 70
redis_stream_length{db="db0",stream="models.millrace:quarantine:generate"} 9
"""


def relabelled(endpoint: Object, labels: dict[str, str]) -> dict[str, str]:
    """Return a sample's labels as Prometheus stores them after the endpoint's rules."""
    found = dict(labels)
    for rule in endpoint["metricRelabelings"]:
        text = ";".join(found.get(name, "") for name in rule["sourceLabels"])
        if match := re.fullmatch(rule["regex"], text):
            found[rule["targetLabel"]] = match.expand(re.sub(r"\$\{?(\d)\}?", r"\\\1", rule.get("replacement", "$1")))
    return found


@pytest.mark.parametrize(("component", "replicas"), [("mm-encoder", 1), ("engine", 3)])
def test_an_hpa_finds_its_stream_and_no_other_among_recorded_metrics(component: str, replicas: int) -> None:
    monitor = find(case(KEDA), "PodMonitor")["spec"]["podMetricsEndpoints"]
    (endpoint,) = [each for each in monitor if each["port"] == "redis-metrics"]
    (metric,) = find(case(HPA), "HorizontalPodAutoscaler", f"millrace-{component}")["spec"]["metrics"]
    wanted = metric["external"]["metric"]["selector"]["matchLabels"]
    stored = [
        ({"app_kubernetes_io_instance": "millrace", **relabelled(endpoint, sample.labels)}, sample.value)
        for family in text_string_to_metric_families(RECORDED)
        for sample in family.samples
        if sample.name == metric["external"]["metric"]["name"]
    ]
    (found,) = [value for labels, value in stored if wanted.items() <= labels.items()]
    assert math.ceil(found / int(metric["external"]["target"]["averageValue"])) == replicas


@pytest.mark.parametrize("service", SERVICES)
def test_replicas_are_spread_over_nodes_where_there_are_some(service: str) -> None:
    """As the scheduler counts: pods that the constraint selects, on each of two nodes."""
    component = service.replace("_", "-")
    metadata, spec = pods(case("defaults"))[component]
    (constraint,) = spec["topologySpreadConstraints"]
    assert constraint["topologyKey"] == "kubernetes.io/hostname"
    assert constraint["whenUnsatisfiable"] == "ScheduleAnyway", "one node must do, too"
    wanted = constraint["labelSelector"]["matchLabels"].items()
    others = [labels["labels"] for name, (labels, _) in pods(case("defaults")).items() if name != component]
    nodes: dict[str, list[dict[str, str]]] = {"one": list(others), "two": []}
    for _ in range(4):
        counts = {name: sum(wanted <= labels.items() for labels in there) for name, there in nodes.items()}
        nodes[min(counts, key=lambda name: counts[name])].append(metadata["labels"])
    assert sum(wanted <= labels.items() for labels in nodes["one"]) == 2
    assert len(nodes["two"]) == 2
