"""A real Prometheus and a real redis_exporter beside the chart's pods: its own rules, in seconds instead of minutes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from chart_pods import Pod
from helm_chart import NAMESPACE, RELEASE, Object, container, find, pods
from machine import PATIENCE_S, free_port

PROMETHEUS = os.environ.get("PROMETHEUS", "")
EXPORTER = os.environ.get("REDIS_EXPORTER", "")
SCRAPE_S = 0.5
# A minute of the rules in seconds: of the windows that they look back over, and of the time that they wait to fire.
WINDOW_S, FOR_S = 2, 0.4
OLDEST_S = 6  # age of an entry that is stuck, in place of that of the longest request
RATE_INTERVAL = "10s"  # Grafana's $__rate_interval


class Prometheus:
    """Server at `port`, and the questions that tests have."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {each["labels"]["alertname"] for each in self._get("alerts")["alerts"] if each["state"] == "firing"}

    def values(self, expression: str) -> list[float]:
        """Return the values of an expression now, those that are no number left out."""
        found = self._get(f"query?{urllib.parse.urlencode({'query': expression})}")["result"]
        numbers = [float(each["value"][1]) for each in found]
        return [number for number in numbers if number == number]

    def wait_until(self, alert: str, fires: bool) -> None:
        """Return when an alert fires, or does not."""
        deadline = time.monotonic() + PATIENCE_S
        while (alert in self.firing()) is not fires:
            assert time.monotonic() < deadline, f"{alert} {'does not fire' if fires else 'fires'}: {self.firing()}"
            time.sleep(SCRAPE_S)

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}", timeout=PATIENCE_S) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]


def hastened(rule: Object) -> Object:
    """Return an alert with seconds for its minutes."""
    expression = re.sub(r"\[(\d+)m\]", lambda found: f"[{int(found[1]) * WINDOW_S}s]", rule["expr"])
    if rule["alert"] == "MillraceStageStuck":
        expression = re.sub(r"> \d{3,}", f"> {OLDEST_S}", expression)
    waits = {"for": f"{int(rule['for'].removesuffix('m')) * FOR_S * 1000:.0f}ms"} if "for" in rule else {}
    return {**rule, **waits, "expr": expression}


def rules_of(items: list[Object]) -> list[Object]:
    (group,) = find(items, "PrometheusRule")["spec"]["groups"]
    return [hastened(rule) for rule in group["rules"]]


@contextlib.contextmanager
def watching(items: list[Object], made: dict[str, Pod], exporter: int, directory: Path) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes all pods as the PodMonitor says, and evaluates the rules."""
    monitor = find(items, "PodMonitor")["spec"]
    (redis,) = [each for each in monitor["podMetricsEndpoints"] if each["port"] == "redis-metrics"]
    targets = {service.replace("_", "-"): pod.environ["MILLRACE_METRICS_PORT"] for service, pod in made.items()}
    jobs = [job(component, int(port), []) for component, port in targets.items()]
    jobs.append(job("redis", exporter, [snake_cased(each) for each in redis["metricRelabelings"]]))
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s".replace("0.5s", "500ms"), "scrape_timeout": "400ms"},
        "rule_files": [str(directory / "rules.yaml")],
        "scrape_configs": jobs,
    }
    config["global"]["evaluation_interval"] = config["global"]["scrape_interval"]
    (directory / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules_of(items)}]}))
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [PROMETHEUS, f"--config.file={directory / 'prometheus.yaml'}", "--log.level=warn"]
    command += [f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    with process(command, directory / "prometheus.log", f"http://127.0.0.1:{port}/-/ready", {}):
        yield Prometheus(port)


def job(component: str, port: int, relabelings: list[Object]) -> Object:
    labels = {
        "namespace": NAMESPACE,
        "app_kubernetes_io_instance": RELEASE,
        "app_kubernetes_io_component": component,
        "pod": f"millrace-{component}-0",
    }
    targets = [{"targets": [f"127.0.0.1:{port}"], "labels": labels}]
    return {"job_name": component, "static_configs": targets, "metric_relabel_configs": relabelings}


def snake_cased(relabeling: Object) -> Object:
    return {re.sub(r"([A-Z])", lambda found: f"_{found[1].lower()}", key): value for key, value in relabeling.items()}


@contextlib.contextmanager
def exporting(items: list[Object], secret: dict[str, str], redis_port: int, directory: Path) -> Iterator[int]:
    """Run redis_exporter with the environment that the chart gives it, and yield its port."""
    port = free_port()
    environ = {"REDIS_EXPORTER_WEB_LISTEN_ADDRESS": f"127.0.0.1:{port}"}
    for each in container(pods(items)["redis"][1], "exporter")["env"]:
        environ[each["name"]] = each.get("value") or secret[each["valueFrom"]["secretKeyRef"]["key"]]
    environ["REDIS_ADDR"] = f"redis://127.0.0.1:{redis_port}"
    with process([EXPORTER], directory / "exporter.log", f"http://127.0.0.1:{port}/health", environ):
        yield port


@contextlib.contextmanager
def process(command: list[str], log: Path, url: str, environ: dict[str, str]) -> Iterator[None]:
    """Run a program until the end of the block, which begins when it answers at `url`."""
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env={"PATH": os.environ["PATH"], **environ})
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not answers(url):
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(SCRAPE_S)
        yield
    finally:
        started.terminate()
        started.wait(PATIENCE_S)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Let a process do nothing, as one that hangs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
