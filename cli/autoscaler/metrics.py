"""Metrics of the autoscaler."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge


class AutoscalerMetrics:
    """Metrics of one process, registered once. A replica that is not the leader leaves the gauges as they are."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"millrace_autoscaler_{name}", text, labels, registry=registry)

        self.leads = gauge("leader", "Whether this replica acts")
        self.work = gauge("work", "Requests of a stage, waiting and running", "stage")
        self.replicas = gauge("replicas", "Replicas asked of Kubernetes", "stage")
        self.wanted = gauge("wanted_replicas", "Replicas that there should be", "stage")
        self.changes = Counter(
            "millrace_autoscaler_changes", "Changes of a stage's replicas", ["stage", "direction"], registry=registry
        )
        self.failures = Counter("millrace_autoscaler_failures", "Looks that failed", ["what"], registry=registry)
