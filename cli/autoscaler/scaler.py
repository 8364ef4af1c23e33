"""Control loop of the autoscaler: become leader, observe, decide, act.

A replica is removed by lowering the Deployment's number and nothing else. Kubernetes then picks the pod whose deletion
costs least, which is the one with the least work, and sends it SIGTERM; the service drains, for as long as the pod's
grace period. (A Drain message would not help: the drained process ends, and Kubernetes starts it again as long as the
number stands.) Requests that are unfinished after that go on in another replica from the token they had reached.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from cli.autoscaler.cluster import ClusterError, Scale
from cli.autoscaler.leader import Leadership
from cli.autoscaler.metrics import AutoscalerMetrics
from cli.autoscaler.observe import Stage, observe
from cli.autoscaler.policy import Decision, Memory, Rules, decide
from shared.bus.keys import Keys
from shared.bus.pipeline_view import read
from shared.log import logger

_log = logger(__name__)


class Cluster(Protocol):
    """Part of Kubernetes that the loop needs: `cli.autoscaler.cluster.Cluster`."""

    async def scale(self, deployment: str) -> Scale: ...

    async def set_replicas(self, deployment: str, scale: Scale, replicas: int) -> None: ...

    async def set_costs(self, scale: Scale, held: Mapping[str, int]) -> None: ...


class Scaler:
    """Scaler of `stages`, by service. With `dry_run` it logs what it would do, and does not do it."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        cluster: Cluster,
        leadership: Leadership,
        stages: Mapping[str, Rules],
        metrics: AutoscalerMetrics,
        dry_run: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._cluster = cluster
        self._leadership = leadership
        self._stages = stages
        self._metrics = metrics
        self._dry_run = dry_run
        self._clock = clock
        self._memories: dict[str, Memory] = {}
        self._led = False

    async def run(self, interval_s: float) -> None:
        """Observe and act every `interval_s`, until cancelled."""
        while True:
            await self.turn()
            await asyncio.sleep(interval_s)

    async def turn(self) -> None:
        """Observe and scale every stage once, if this replica leads. A failure is logged and tried again next time.

        Memories cover observations without a gap: after an outage, work that is only late may seem to be gone.
        """
        try:
            leads = await self._leadership.hold()
            self._say_who_leads(leads)
            if not leads:
                self._memories.clear()
                return
            view = await read(self._redis, self._keys)
        except RedisError as error:
            self._memories.clear()
            self._failed("redis", error)
            return
        for service, rules in self._stages.items():
            try:
                await self._scale(service, rules, observe(view, service))
            except ClusterError as error:
                self._failed(service, error)

    async def _scale(self, service: str, rules: Rules, stage: Stage) -> None:
        scale = await self._cluster.scale(rules.deployment)
        now = self._clock()
        memory = self._memories.get(service) or Memory(now)
        self._memories[service], decision = decide(rules, stage.seen(scale.replicas), memory, now)
        self._show(service, stage, scale, decision)
        if decision.step == "stay":
            return
        _log.info(
            decision.step,
            extra={"stage": service, "from": scale.replicas, "to": decision.replicas, "why": decision.why},
        )
        if self._dry_run:
            return
        if not self._leadership.valid:
            _log.warning("not scaled: leadership has expired, and another replica may lead", extra={"stage": service})
        elif decision.step == "mark":
            await self._cluster.set_costs(scale, stage.held)
        else:
            await self._cluster.set_replicas(rules.deployment, scale, decision.replicas)
            self._metrics.changes.labels(service, decision.step).inc()

    def _say_who_leads(self, leads: bool) -> None:
        self._metrics.leads.set(leads)
        if leads != self._led:
            _log.info("leading: this replica acts" if leads else "not leading: another replica acts")
        self._led = leads

    def _show(self, service: str, stage: Stage, scale: Scale, decision: Decision) -> None:
        self._metrics.work.labels(service).set(stage.work)
        self._metrics.replicas.labels(service).set(scale.replicas)
        self._metrics.wanted.labels(service).set(decision.replicas)

    def _failed(self, what: str, error: Exception) -> None:
        self._metrics.failures.labels(what).inc()
        _log.warning("not scaled", extra={"stage": what, "reason": str(error)})
