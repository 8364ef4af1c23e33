"""The rendered pods run, as processes, and do what Kubernetes and Helm will ask of them."""

import urllib.request
from collections.abc import Iterator

import pytest
from chart_pods import Pod, helm_test, running
from helm_chart import SERVICES
from machine import PATIENCE_S


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pod]]:
    with running(tmp_path_factory.mktemp("pods"), dict.fromkeys(SERVICES, Pod)) as pods:
        yield pods


def test_every_probe_is_content(system: dict[str, Pod]) -> None:
    for service, pod in system.items():
        assert pod.probe("readiness"), service
        assert pod.probe("liveness"), service


def test_helm_test_passes(system: dict[str, Pod]) -> None:
    done = helm_test(system["gateway"].url)
    assert done.returncode == 0, done.stderr
    assert "streamed: " in done.stdout


def test_metrics_are_where_the_podmonitor_looks(system: dict[str, Pod]) -> None:
    for service, pod in system.items():
        url = f"http://127.0.0.1:{pod.environ['MILLRACE_METRICS_PORT']}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
            assert b"millrace_" in reply.read(), service


def test_they_end_when_told_and_are_not_ready_then(system: dict[str, Pod]) -> None:
    """Last in this file: in the order in which a release is taken down."""
    for service, pod in system.items():
        assert pod.stop() == 0, pod.log.read_text()
        if service != "gateway":
            assert not pod.probe("readiness")
