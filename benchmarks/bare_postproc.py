"""A postproc that guarantees nothing, to measure what the guarantees cost: `python -m benchmarks.bare_postproc`.

No journal, no fence, nothing kept after the end; the rest is the service as it ships. Let it die and every answer under
way is lost.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prometheus_client import REGISTRY
from redis.asyncio import Redis

from services.postproc.metrics import PostprocMetrics
from services.postproc.outbox import Outbox
from services.postproc.request_states import RequestState, TurnOutput
from services.postproc.settings import PostprocSettings
from services.postproc.text.detokenize import Vocabulary
from services.postproc.worker import SERVICE, Worker
from shared import service
from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.leases import Fence
from shared.bus.wire import Wire
from shared.messages import Delta, Deltas, to_entry
from shared.model.tokenizer import Tokenizer
from shared.tracing import Tracing


class BareOutbox(Outbox):
    """Plain commands where the real one asks in a script whose the shard is."""

    def __init__(self, redis: Redis, keys: Keys, deltas_max_len: int) -> None:
        super().__init__(redis, keys, deltas_max_len)
        self._redis = redis
        self._wire = Wire(redis)
        self._max_len = deltas_max_len

    async def send(self, deltas: Mapping[str, Sequence[Delta]], fence: Fence) -> None:
        for gateway, items in deltas.items():
            fields = [word for pair in to_entry(Deltas(tuple(items))).items() for word in pair]
            await self._wire.call("XADD", self._keys.deltas(gateway), "MAXLEN", "~", self._max_len, "*", *fields)

    async def trim(self, shard: int, before: tuple[int, int], exactly: bool, fence: Fence) -> None:
        await command(self._redis, "XTRIM", self._keys.tokens(shard), "MINID", "~", f"{before[0]}-{before[1]}")


class BareWorker(Worker):
    """Takes everything for saved, and deletes what has ended."""

    def __init__(
        self, redis: Redis, keys: Keys, settings: PostprocSettings, vocabulary: Vocabulary, metrics: PostprocMetrics
    ) -> None:
        super().__init__(redis, keys, settings, vocabulary, metrics)
        self._outbox = BareOutbox(redis, keys, settings.deltas_max_len)

    async def _save(self, states: list[RequestState]) -> None:
        for state in states:
            state.saved()

    async def _end(self, turn: TurnOutput) -> None:
        turn.gone += [state.request_id for state in turn.kept]
        turn.kept.clear()
        await super()._end(turn)


def build(settings: PostprocSettings, redis: Redis, *, tracing: Tracing) -> Worker:
    """As the real one is put together, without traces."""
    vocabulary = Vocabulary(Tokenizer.load(Path(settings.model)))
    return BareWorker(redis, Keys(settings.namespace), settings, vocabulary, PostprocMetrics(REGISTRY))


if __name__ == "__main__":
    sys.exit(service.launch(SERVICE, PostprocSettings, build, os.environ))
