"""Reading of the pipeline's state for scaling."""

import msgspec

from cli.autoscaler.policy import Seen
from shared.bus.pipeline_view import HELD, PipelineView, StageView

FEEDS = {"engine": "mm_encoder"}  # whose work becomes whose


class Stage(msgspec.Struct, frozen=True):
    """Load of a stage: `work`, `coming` and `added` as the policy has them; `held`: requests of each replica, by its
    name."""

    work: int
    coming: int
    held: dict[str, int]
    added: int = 0

    def seen(self, replicas: int) -> Seen:
        return Seen(self.work, replicas, self.coming, self.added)


def observe(view: PipelineView, service: str) -> Stage:
    """Return a stage's load. Its work is the length of its stream, whose entries are deleted when they are done; for a
    stage without a stream, what its replicas say they hold. The work of a draining replica is not counted."""
    stage = view.stage(service)
    held = _held(stage)
    leaving = sum(held.get(replica.name, 0) for replica in stage.within("draining"))
    work = stage.queue.length if stage.queue else sum(held.values())
    feeder = view.stage(FEEDS[service]).queue if service in FEEDS else None
    added = stage.queue.added if stage.queue else 0
    return Stage(max(0, work - leaving), feeder.length if feeder else 0, held, added)


def _held(stage: StageView) -> dict[str, int]:
    if stage.queue:
        return {consumer.name: consumer.pending for consumer in stage.queue.consumers}
    return {replica.name: int(replica.load.get(HELD[stage.service], 0)) for replica in stage.replicas}
