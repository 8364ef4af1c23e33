"""A postproc that guarantees nothing, to measure what the guarantees cost: `python -m benchmarks.bare_postproc`.

It has no journal and no fence, and keeps nothing after the end; the rest is the service as it ships. If it dies, every
answer under way is lost.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prometheus_client import REGISTRY
from redis.asyncio import Redis

from services.postproc.__main__ import compose
from services.postproc.outbox import Outbox
from services.postproc.owned_shards import SERVICE, OwnedShards
from services.postproc.request_state import EntryId, RequestState
from services.postproc.settings import PostprocSettings
from services.postproc.text.detokenize import Vocabulary
from services.postproc.worker import Worker
from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.records import Records
from shared.bus.wire import Wire
from shared.launch import launch
from shared.message_codec import to_entry
from shared.messages import Delta, Deltas
from shared.model.tokenizer import Tokenizer
from shared.tracing import Tracing


class BareOutbox(Outbox):
    """Plain commands in place of scripts that check the fence. Everything counts as journaled, nothing is retained."""

    def __init__(self, redis: Redis, keys: Keys, records: Records, shards: OwnedShards, deltas_max_len: int) -> None:
        super().__init__(redis, keys, records, shards, deltas_max_len)
        self._redis = redis
        self._wire = Wire(redis)
        self._max_len = deltas_max_len

    async def send(self, deltas: Mapping[str, Sequence[Delta]]) -> None:
        for gateway, items in deltas.items():
            fields = [word for pair in to_entry(Deltas(tuple(items))).items() for word in pair]
            await self._wire.call("XADD", self._keys.deltas(gateway), "MAXLEN", "~", self._max_len, "*", *fields)

    async def journal(self, states: list[RequestState]) -> int:
        for state in states:
            state.mark_journaled()
        return 0

    async def retain(self, states: Sequence[RequestState]) -> None:
        await self.delete([state.request_id for state in states])

    async def trim(self, shard: int, before: EntryId, exactly: bool) -> None:
        await command(self._redis, "XTRIM", self._keys.tokens(shard), "MINID", "~", f"{before[0]}-{before[1]}")


def build(settings: PostprocSettings, redis: Redis, *, tracing: Tracing) -> Worker:
    """Build the service as the real one is built, without traces."""
    vocabulary = Vocabulary(Tokenizer.load(Path(settings.model)))
    return compose(settings, redis, vocabulary, REGISTRY, outbox=BareOutbox)


if __name__ == "__main__":
    sys.exit(launch(SERVICE, PostprocSettings, build, os.environ))
