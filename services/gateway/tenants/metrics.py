"""Metrics of tenants. The label `key` is a name of the key file, of which there are `key_file.MOST_KEYS` at most."""

from prometheus_client import CollectorRegistry, Counter

from shared.metrics import at_zero


class TenantMetrics:
    """Metrics of one process, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "millrace_key_requests", "Requests admitted, by the name of their API key", ("key",), registry=registry
        )
        self.tokens = Counter(
            "millrace_key_tokens", "Tokens of prompts and answers that have ended", ("key", "kind"), registry=registry
        )
        self.refusals = Counter(
            "millrace_key_refusals",
            "Requests refused by a limit; of the whole server where there is no key",
            ("key", "limit"),
            registry=registry,
        )
        self.unauthorized = Counter(
            "millrace_unauthorized_requests", "Requests without a valid API key", ("reason",), registry=registry
        )
        self.reloads = Counter(
            "millrace_key_file_reloads", "Times the changed key file was read", ("outcome",), registry=registry
        )
        at_zero(self.unauthorized, "missing", "unknown")
        at_zero(self.reloads, "read", "failed")
