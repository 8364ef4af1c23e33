"""What the owner of shards sends and cuts, under its fence: one script a write, whatever it carries."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.bus.leases import Fence
from shared.bus.lua import read_script
from shared.bus.wire import Wire, WireScript
from shared.messages import VERSION, Delta, Deltas, to_entry

HERE = Path(__file__).parent  # where the scripts are


class Outbox:
    """Every write raises FencedError, having done nothing, when one of the fence's shards is not ours any more."""

    def __init__(self, redis: Redis, keys: Keys, deltas_max_len: int) -> None:
        self._keys = keys
        self._deltas_max_len = deltas_max_len
        self._send = WireScript(Wire(redis), read_script("send_deltas", HERE))
        self._trim = redis.register_script(read_script("trim_tokens", HERE))

    async def send(self, deltas: Mapping[str, Sequence[Delta]], fence: Fence) -> None:
        """One message to every gateway."""
        packed = [to_entry(Deltas(tuple(items)))[b"m"] for items in deltas.values()]
        await fence.run(self._send, [*map(self._keys.deltas, deltas)], [self._deltas_max_len, VERSION, *packed])

    async def trim(self, shard: int, before: tuple[int, int], exactly: bool, fence: Fence) -> None:
        """Cut a tokens stream below an entry id; if not `exactly`, as far as is cheap."""
        milliseconds, number = before
        words = ["=" if exactly else "~", f"{milliseconds}-{number}"]
        await fence.run(self._trim, [self._keys.tokens(shard)], words)
