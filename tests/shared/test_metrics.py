import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from machine import PATIENCE_S
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared import metrics
from shared.errors import ConfigError


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as response:
        return str(response.read(), "utf-8")


def test_serves_what_was_counted(unused_port: int) -> None:
    Counter("millrace_test_things", "Things counted by a test.").inc(3)
    stop = metrics.serve(unused_port)
    try:
        assert "millrace_test_things_total 3.0" in scrape(unused_port)
        with pytest.raises(ConfigError, match="MILLRACE_METRICS_PORT"):
            metrics.serve(unused_port)
    finally:
        stop()


def test_another_address_does_not_answer(unused_port: int) -> None:
    stop = metrics.serve(unused_port, "127.0.0.2")
    try:
        with pytest.raises(urllib.error.URLError):
            scrape(unused_port)
        with urllib.request.urlopen(f"http://127.0.0.2:{unused_port}/metrics", timeout=PATIENCE_S) as response:
            assert response.status == 200
    finally:
        stop()


def test_no_port_no_listener() -> None:
    metrics.serve(0)()


@pytest.mark.system
def test_one_listener_for_several_processes(unused_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    count = "from prometheus_client import Counter; Counter('millrace_shared', 'Shared.').inc()"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", count], env=os.environ, check=True)
    stop = metrics.serve(unused_port)
    try:
        assert "millrace_shared_total 2.0" in scrape(unused_port)
    finally:
        stop()


def test_what_a_process_has_counted_can_be_read_back() -> None:
    registry = CollectorRegistry()
    counter = Counter("millrace_test_read", "Read back.", ["kind"], registry=registry)
    gauge = Gauge("millrace_test_held", "Held.", registry=registry)
    histogram = Histogram("millrace_test_seconds", "Seconds.", ["stage"], registry=registry)
    counter.labels("a").inc(2)
    counter.labels("b").inc(3)
    gauge.set(4)
    histogram.labels("a").observe(0.5)
    histogram.labels("b").observe(1.5)
    assert metrics.value(counter) == 5
    assert metrics.value(gauge) == 4
    assert metrics.observed(histogram) == (2.0, 2.0)
    assert metrics.observed(histogram.labels("a")) == (0.5, 1.0)


def test_the_time_of_a_hop_is_counted_from_the_ids_of_entries() -> None:
    seconds = metrics._hops.labels("a test's")
    hop = metrics.Hop("a test's", clock=lambda: 100.0)
    hop.read(["99500-0", "98000-7"])
    assert metrics.observed(seconds) == (2.5, 2.0)
    hop.read(["100250-1"])  # of a Redis whose clock is ahead of ours
    assert metrics.observed(seconds) == (2.5, 3.0)
