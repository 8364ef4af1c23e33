"""Every alert of the chart fires for its cause and for no longer, and every panel shows something under load.

By a real Prometheus and a real redis_exporter: `make test-alerts` says what it needs. Each test makes its alert true
and waits until it is false again, so that the next one begins with nothing firing.
"""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chart_pods import VALUES, Pod
from chart_prometheus import (
    EXPORTER,
    PROMETHEUS,
    RATE_INTERVAL,
    SCRAPE_S,
    Prometheus,
    exporting,
    paused,
    rules_of,
    watching,
)
from chart_valkey import valkey
from helm_chart import NAMESPACE, RELEASE, SERVICES, Object, find, objects
from machine import PATIENCE_S, free_port
from redis import Redis
from system import data_url, encoded, picture

from cli.demo import write_demo
from shared.bus.keys import GENERATE, Keys

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.skipif(not (PROMETHEUS and EXPORTER), reason="see make test-alerts"),
]
KEYS = Keys(f"{NAMESPACE}.{RELEASE}")
WATCHED = {**VALUES, "monitoring": {"podMonitor": True, "rules": True, "dashboard": True}, "autoscaling": {}}
WATCHED["engine"] = {**VALUES["engine"], "replicas": 1}


class Release:
    """A release of the chart that runs here and is watched."""

    def __init__(
        self, items: list[Object], made: dict[str, Pod], redis: Redis, redis_pid: int, prometheus: Prometheus
    ) -> None:
        self.redis_pid = redis_pid
        self.items = items
        self.pods = made
        self.redis = redis
        self.prometheus = prometheus

    def ask(self, timeout_s: float = PATIENCE_S, **fields: Any) -> str:
        """Send a chat request and return its whole answer as it is on the wire."""
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **fields}
        headers = {"Authorization": "Bearer sk-one", "X-Request-Timeout": str(timeout_s)}
        url = f"{self.pods['gateway'].url}/v1/chat/completions"
        return httpx.post(url, json=body, headers=headers, timeout=PATIENCE_S).text

    @contextlib.contextmanager
    def asking(self, **fields: Any) -> Iterator[None]:
        """Ask beside the block, and wait for the answer at its end."""
        thread = threading.Thread(target=self.ask, kwargs=fields)
        thread.start()
        yield
        thread.join()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    directory = tmp_path_factory.mktemp("alerts")
    items = objects(WATCHED)
    write_demo(directory / "model", dtype="float32")
    with contextlib.ExitStack() as stack:
        port = free_port()
        secret = stack.enter_context(valkey(items, directory, port))
        made = {}
        for service in SERVICES:
            keyed = secret | {"keys": '["sk-one"]'}
            made[service] = Pod(items, service, keyed, directory / "model", directory / f"{service}.log")
            stack.callback(made[service].kill)
        for pod in made.values():
            pod.wait_until_started()
        exporter = stack.enter_context(exporting(items, secret, port, directory))
        operator = f"redis://operator:{secret['operator-password']}@127.0.0.1:{port}"
        redis = stack.enter_context(Redis.from_url(operator))
        prometheus = stack.enter_context(watching(items, made, exporter, directory))
        with Redis.from_url(f"redis://monitor:{secret['monitor-password']}@127.0.0.1:{port}") as monitor:
            pid = monitor.info("server")["process_id"]
        yield Release(items, made, redis, pid, prometheus)


@contextlib.contextmanager
def fires(release: Release, *alerts: str) -> Iterator[None]:
    """Expect alerts to fire for what is done before the block, in which it is undone, and to cease then."""
    for alert in alerts:
        release.prometheus.wait_until(alert, True)
    yield
    for alert in alerts:
        release.prometheus.wait_until(alert, False)


def test_nothing_fires_and_every_panel_has_data_under_load(release: Release) -> None:
    stop = threading.Event()

    def ask_of_pictures() -> None:
        for seed in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
            url = data_url(encoded(picture(56, 56, seed), "PNG"), "image/png")
            image = {"type": "image_url", "image_url": {"url": url}}
            release.ask(messages=[{"role": "user", "content": [image]}], stream=True)

    def ask_for_text() -> None:
        while not stop.is_set():
            release.ask(max_tokens=20, ignore_eos=True)

    # One panel shows nothing else than a quarantine, and some only what is in work while Prometheus looks.
    release.redis.xadd(KEYS.quarantine(GENERATE), {"a": "b"})
    threads = [threading.Thread(target=load) for load in (ask_of_pictures, *[ask_for_text] * 5)]
    for thread in threads:
        thread.start()
    try:
        wanted = dict(panels(release.items))
        deadline = time.monotonic() + PATIENCE_S
        while wanted := {title: asked for title, asked in wanted.items() if not release.prometheus.values(asked)}:
            assert time.monotonic() < deadline, f"these show nothing: {wanted}"
            time.sleep(SCRAPE_S)
        assert release.prometheus.firing() <= {"MillraceQuarantine", "MillraceStageBacklog"}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        release.redis.delete(KEYS.quarantine(GENERATE))
    for alert in ("MillraceQuarantine", "MillraceStageBacklog"):
        release.prometheus.wait_until(alert, False)


def panels(items: list[Object]) -> list[tuple[str, str]]:
    """Return the panels' queries, as Grafana asks them."""
    (text,) = find(items, "ConfigMap", "millrace-dashboard")["data"].values()
    found = []
    for panel in json.loads(text)["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in (("$namespace", NAMESPACE), ("$release", RELEASE), ("$__rate_interval", RATE_INTERVAL)):
                expression = expression.replace(name, value)
            found.append((f"{panel['title']} {target['refId']}", expression))
    return found


def test_an_engine_that_hangs(release: Release) -> None:
    """Work waits for it, longer and longer, no engine answers, and the first token comes late."""
    alerts = ("MillraceStageBacklog", "MillraceStageStuck", "MillraceStageWithoutReplica", "MillraceReplicaDown")
    with release.asking():
        with paused(release.pods["engine"].process.pid):
            for alert in alerts:
                release.prometheus.wait_until(alert, True)
            threading.Event().wait(10.0)  # of which a first token after ten seconds is part
        release.prometheus.wait_until("MillraceSlowFirstToken", True)
    for alert in (*alerts, "MillraceSlowFirstToken"):
        release.prometheus.wait_until(alert, False)


def test_streams_that_fail_behind_their_200(release: Release) -> None:
    with paused(release.pods["engine"].process.pid):
        streamed = release.ask(timeout_s=1.0, stream=True)
        assert "timeout_error" in streamed
    with fires(release, "MillraceErrors"):
        pass


def test_refusals_and_looks_at_health_are_no_errors(release: Release) -> None:
    for _ in range(20):
        assert "error" in release.ask(temperature=-1)
        httpx.get(f"{release.pods['gateway'].url}/health/live", timeout=PATIENCE_S)
    release.ask()
    threading.Event().wait(5.0)  # several scrapes and evaluations
    assert "MillraceErrors" not in release.prometheus.firing()


def test_an_entry_that_cannot_be_read(release: Release) -> None:
    release.redis.xadd(KEYS.stream(GENERATE), {"m": b"\xc1"})
    with fires(release, "MillraceQuarantine"):
        release.redis.delete(KEYS.quarantine(GENERATE))


def test_replicas_that_come_and_go(release: Release) -> None:
    stop = threading.Event()

    def flap() -> None:
        while not stop.wait(1.5):
            release.redis.sadd(KEYS.replicas("postproc"), "one-more")
            stop.wait(1.5)
            release.redis.srem(KEYS.replicas("postproc"), "one-more")

    thread = threading.Thread(target=flap)
    thread.start()
    try:
        release.prometheus.wait_until("MillraceLeaseFlaps", True)
    finally:
        stop.set()
        thread.join()
        release.redis.srem(KEYS.replicas("postproc"), "one-more")
    release.prometheus.wait_until("MillraceLeaseFlaps", False)


def test_a_redis_that_is_full(release: Release) -> None:
    release.redis.setrange(KEYS.request("filler"), 228 << 20, b"x")  # of 256
    with fires(release, "MillraceRedisMemory"):
        release.redis.delete(KEYS.request("filler"))


def test_a_redis_that_does_not_answer(release: Release) -> None:
    with paused(release.redis_pid):
        release.prometheus.wait_until("MillraceRedisDown", True)
    release.prometheus.wait_until("MillraceRedisDown", False)


def test_every_alert_was_tried(release: Release) -> None:
    tried = Path(__file__).read_text()
    assert {rule["alert"] for rule in rules_of(release.items) if f'"{rule["alert"]}"' not in tried} == set()
