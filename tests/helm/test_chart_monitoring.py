"""Alerts and the dashboard ask only for metrics that the services, or the exporter, really have."""

import json
import re
from importlib import import_module

import pytest
import yaml
from helm_chart import CHART, ROOT, SERVICES, Object, case, find, pods
from prometheus_client import CollectorRegistry

from shared.bus.keys import ENCODE, GENERATE, Keys

MONITORED = "fetched model, keda, monitoring, tls"
CLASSES = {
    "gateway": "GatewayMetrics",
    "mm_encoder": "Metrics",
    "engine": "EngineMetrics",
    "postproc": "PostprocMetrics",
}
# Of redis_exporter and of Prometheus itself.
FOREIGN = {
    "redis_stream_length",
    "redis_stream_first_entry_id",
    "redis_stream_group_messages_pending",
    "redis_key_size",
    "redis_up",
    "redis_memory_used_bytes",
    "redis_memory_max_bytes",
    "redis_commands_processed_total",
    "redis_connected_clients",
    "redis_blocked_clients",
    "up",
}
HOPS = {f"millrace_hop_seconds_{suffix}" for suffix in ("bucket", "sum", "count")}  # of all services: shared/metrics.py
RESERVED = {"max", "sum", "count", "rate", "time", "changes", "absent", "unless", "and", "by", "on", "le", "stage"}


def exposed() -> set[str]:
    """Return the names of all series that the four services expose."""
    names = set(HOPS)
    for service, cls in CLASSES.items():
        registry = CollectorRegistry()
        getattr(import_module(f"services.{service}.metrics"), cls)(registry)
        for family in registry.collect():
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            names |= {family.name + suffix for suffix in suffixes}
    return names


def asked(expression: str) -> set[str]:
    """Return the metrics that a PromQL expression names: words outside braces, brackets, quotes and grouping lists."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", "", bare)
    words = set(re.findall(r"[a-z_:][a-z0-9_:]*", bare)) - RESERVED
    return {word for word in words if "_" in word or word == "up"}


def rules() -> list[Object]:
    (group,) = find(case(MONITORED), "PrometheusRule")["spec"]["groups"]
    return group["rules"]


def dashboard() -> Object:
    (text,) = find(case(MONITORED), "ConfigMap", "millrace-dashboard")["data"].values()
    return json.loads(text)


def expressions() -> dict[str, str]:
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    return found


@pytest.mark.parametrize("where", expressions())
def test_every_metric_asked_for_exists(where: str) -> None:
    expression = expressions()[where]
    wanted = asked(expression) - {"histogram_quantile"}
    assert wanted, "no metric found, so the test looks in the wrong place"
    assert wanted <= exposed() | FOREIGN
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")


def test_a_metric_that_does_not_exist_is_noticed() -> None:
    assert asked('max by (a) (rate(millrace_nothing_total{x="y_z"}[5m])) > 1') == {"millrace_nothing_total"}
    assert "millrace_nothing_total" not in exposed()


def test_every_alert_says_what_is_wrong_and_how_bad_and_the_manual_explains_it() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
    explained = re.findall(r"^\| `(Millrace\w+)` \|", manual, re.MULTILINE)
    assert sorted(explained) == sorted({rule["alert"] for rule in rules()})


def test_alerts_of_a_redis_that_is_not_ours_are_left_to_its_owner() -> None:
    (group,) = find(case("external redis with users, hpa, placement"), "PrometheusRule")["spec"]["groups"]
    assert not {rule["alert"] for rule in group["rules"]} & {"MillraceRedisDown", "MillraceRedisMemory"}


def test_streams_are_watched_under_their_real_names() -> None:
    spec = pods(case(MONITORED))["redis"][1]
    (exporter,) = [each for each in spec["containers"] if each["name"] == "exporter"]
    told = {each["name"]: each.get("value") for each in exporter["env"]}
    keys = Keys("models.millrace")
    work = [keys.stream(ENCODE), keys.stream(GENERATE), keys.quarantine(ENCODE), keys.quarantine(GENERATE)]
    assert told["REDIS_EXPORTER_CHECK_SINGLE_STREAMS"] == ",".join(work)
    assert told["REDIS_EXPORTER_CHECK_SINGLE_KEYS"] == ",".join(map(keys.replicas, SERVICES))
    pattern = next(rule["expr"] for rule in rules() if rule["alert"] == "MillraceStageBacklog")
    (selector,) = set(re.findall(r'stream=~"([^"]*)"', pattern))
    assert [stream for stream in work if re.fullmatch(selector, stream)] == work[:2]


def test_prometheus_finds_every_pod_that_has_metrics() -> None:
    monitor = find(case(MONITORED), "PodMonitor")["spec"]
    wanted = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    for component in ("gateway", "mm-encoder", "engine", "postproc", "redis"):
        metadata, spec = pods(case(MONITORED))[component]
        assert monitor["selector"]["matchLabels"].items() <= metadata["labels"].items()
        assert wanted & {port["name"] for each in spec["containers"] for port in each["ports"]}


def test_the_dashboard_is_found_by_grafana_and_does_not_overlap() -> None:
    assert find(case(MONITORED), "ConfigMap", "millrace-dashboard")["metadata"]["labels"]["grafana_dashboard"] == "1"
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert place["x"] + place["w"] <= 24
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_the_dashboards_file_is_written_as_it_is() -> None:
    """Braces in it are Grafana's, which Helm must not read as its own."""
    assert dashboard() == yaml.safe_load((CHART / "files" / "dashboard.json").read_text())
