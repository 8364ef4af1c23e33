"""Command `millrace status`: the pipeline at one moment, for people or, with --json, for scripts.

Exit status: 0 all is well, 1 something is wrong (and is printed), 2 Redis could not be asked.
"""

import asyncio
import sys
from collections.abc import Mapping, Sequence

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cli.connection import no_answer, parser
from shared.bus.client import connect
from shared.bus.key_types import naming_wrong_types, wrong_types
from shared.bus.keys import Keys
from shared.bus.pipeline_view import HELD, BatchesView, PipelineView, StageView, problems, read
from shared.visible import visible

WELL, UNWELL, UNKNOWN = 0, 1, 2


class Status(msgspec.Struct, frozen=True):
    """Output of --json."""

    healthy: bool
    problems: list[str]
    pipeline: PipelineView


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command and return the exit status.

    Raises:
        ConfigError: a flag is wrong.
    """
    flags = parser("millrace status", "What the pipeline is doing.", environ)
    flags.add_argument("--json", action="store_true", help="everything, as one JSON object")
    given = flags.parse_args(words)
    try:
        view = asyncio.run(read_once(given.redis_url, given.blob_redis_url, given.namespace))
    except RedisError as error:
        print(f"millrace status: {no_answer(error)}", file=sys.stderr)
        return UNKNOWN
    found = problems(view)
    if given.json:
        print(msgspec.json.encode(Status(not found, found, view)).decode())
    else:
        lines = [*map(line, view.stages), *batches_line(view.batches)]
        print("\n".join(map(visible, [*lines, *(f"! {problem}" for problem in found)])))
    return UNWELL if found else WELL


async def read_once(redis_url: str, blob_redis_url: str | None, namespace: str) -> PipelineView:
    """Connect to Redis, read the pipeline's state, and disconnect.

    Raises:
        ConfigError: a URL is malformed.
        RedisError: Redis does not answer, or somebody else has written keys that this needs, which it names.
    """
    redis = connect(redis_url)
    blobs = connect(blob_redis_url) if blob_redis_url else None
    try:
        return await look(redis, Keys(namespace), blobs)
    finally:
        for client in (redis, blobs):
            if client is not None:
                await client.aclose()


async def look(redis: Redis, keys: Keys, blobs: Redis | None) -> PipelineView:
    """Read the pipeline's state, with the keys that somebody else has written.

    Raises:
        RedisError: Redis does not answer, or somebody else has written keys that this needs, which it names.
    """
    async with naming_wrong_types(redis, keys, blobs):
        view = await read(redis, keys, blobs)
    return msgspec.structs.replace(view, misplaced=tuple(await wrong_types(redis, keys, blobs)))


def line(stage: StageView) -> str:
    """Write a stage as a line: its replicas by state, and its work."""
    states = dict.fromkeys(replica.state for replica in stage.replicas)
    counts = ", ".join(f"{len(stage.within(state))} {state}" for state in states) or "no replica"
    held = sum(replica.load.get(HELD[stage.service], 0) for replica in stage.replicas)
    waiting = f", {stage.queue.waiting} waiting" if stage.queue else ""
    return f"{stage.service:10} {counts}; {held:.0f} in work{waiting}"


def batches_line(batches: BatchesView) -> list[str]:
    """Write the batches that have not ended as a line; none where there are none."""
    if not batches.count:
        return []
    results = f"{batches.done} of {batches.lines} lines have a result"
    return [f"{'batches':10} {batches.working} in work, {batches.waiting} waiting; {results}"]
