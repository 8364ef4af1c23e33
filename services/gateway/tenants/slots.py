"""Slots of one gateway that its tenants' HTTP requests take, so that none of them takes all."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from services.gateway.errors import too_many
from services.gateway.tenants.key_file import Tenant
from services.gateway.tenants.metrics import TenantMetrics


class TenantSlots:
    """Count of the HTTP requests of each tenant that are here. Checked before a body is read."""

    def __init__(self, limit: int, metrics: TenantMetrics) -> None:
        self._limit = limit
        self._metrics = metrics
        self._taken: Counter[str] = Counter()

    @contextmanager
    def slot(self, tenant: Tenant | None) -> Iterator[None]:
        """Hold a slot.

        Raises:
            RequestError: 429, the tenant has its share.
        """
        if tenant is None:
            yield
            return
        name = tenant.name
        if self._taken[name] >= self._limit:
            self._metrics.refusals.labels(name, "share").inc()
            raise too_many(
                f"The API key {name!r} has {self._limit} requests at this gateway, "
                "its share (tenant_share) of max_concurrency."
            )
        self._taken[name] += 1
        try:
            yield
        finally:
            self._taken[name] -= 1
            if not self._taken[name]:
                del self._taken[name]
