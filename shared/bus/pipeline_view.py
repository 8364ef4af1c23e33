"""Snapshot of the whole pipeline as Redis knows it: read in two round trips, without writing, into plain values.

Ages are by Redis's clock, which also made the ids of the entries. The size of a snapshot grows with the number of
replicas and shards only: entries and batches are counted and dated inside Redis, and never fetched.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, ResponseError

from shared.bus.eviction import ANY_KEY, KEEPS_ALL
from shared.bus.key_types import REMEDY
from shared.bus.keys import ENCODE, GENERATE, NEWER, SERVICES, WAITING, Keys
from shared.bus.leases import COUNT, UNREADABLE, Replica
from shared.bus.lua import read_script

QUEUES = {"mm_encoder": ENCODE, "engine": GENERATE}
HELD = {"gateway": "requests", "mm_encoder": "running", "engine": "held", "postproc": "open"}  # names in a lease's load
ROOM = {"mm_encoder": "limit", "engine": "capacity"}

LONG_WAIT_S = 300.0
FULL = 0.85  # of Redis's memory


class ReplicaView(msgspec.Struct, frozen=True):
    """Replica, by its lease. `gone`: its lease has expired without having been released."""

    name: str
    state: str  # starting, ready, draining; gone; unreadable (of another version)
    version: str = ""
    up_s: float | None = None
    expires_s: float | None = None  # until its lease does, unless it is renewed
    load: dict[str, float] = {}


class ConsumerView(msgspec.Struct, frozen=True):
    """Member of a consumer group, and the number of entries pending under its name."""

    name: str
    pending: int
    idle_s: float  # since it last asked for work


class QueueView(msgspec.Struct, frozen=True):
    """Work stream. `length` counts all entries; those that are not pending have never been delivered,
    or wait for their turn among tenants. `added` counts
    those that there ever were, since the stream was made."""

    stream: str
    length: int
    pending: int
    oldest_s: float | None
    waiting_s: float | None  # age of the oldest entry that waits
    consumers: tuple[ConsumerView, ...]
    quarantined: int
    added: int = 0

    @property
    def waiting(self) -> int:
        return max(0, self.length - self.pending)


class StageView(msgspec.Struct, frozen=True):
    """Service with its replicas and its work stream."""

    service: str
    replicas: tuple[ReplicaView, ...]
    queue: QueueView | None  # None for a service without a work stream

    @property
    def ready(self) -> tuple[ReplicaView, ...]:
        return self.within("ready")

    def within(self, *states: str) -> tuple[ReplicaView, ...]:
        return tuple(replica for replica in self.replicas if replica.state in states)


class ShardView(msgspec.Struct, frozen=True):
    """Tokens stream. `owner` is None if no living replica owns it."""

    shard: int
    length: int
    oldest_s: float | None
    owner: str | None
    epoch: int


class BatchesView(msgspec.Struct, frozen=True):
    """Batches that have not ended, and their lines."""

    working: int = 0  # batches that a gateway works on
    waiting: int = 0
    lines: int = 0
    done: int = 0  # lines with a result
    oldest_s: float | None = None

    @property
    def count(self) -> int:
        return self.working + self.waiting


class BlobsView(msgspec.Struct, frozen=True):
    """Number and size of the blobs, by their index."""

    count: int
    bytes: int


class RedisView(msgspec.Struct, frozen=True):
    """State of the Redis server, by INFO."""

    version: str
    up_s: float
    used_bytes: int
    max_bytes: int  # 0: no limit of its own
    clients: int
    blocked: int
    ops_per_s: int
    evicted: int
    kept_on_disk: bool
    policy: str = KEEPS_ALL  # by which it evicts when it is full


class PipelineView(msgspec.Struct, frozen=True):
    """Snapshot of all services, streams and stores."""

    namespace: str
    at: float  # unix seconds
    stages: tuple[StageView, ...]
    shards: tuple[ShardView, ...]
    control_length: int
    blobs: BlobsView
    redis: RedisView | None  # None: INFO was not asked for, or is forbidden to this user
    batches: BatchesView = BatchesView()
    misplaced: tuple[str, ...] = ()  # keys that somebody else has written, in words, where they were looked for

    def stage(self, service: str) -> StageView:
        return next(stage for stage in self.stages if stage.service == service)


async def read(redis: Redis, keys: Keys, blob_redis: Redis | None = None, *, server: bool = True) -> PipelineView:
    """Take a snapshot. `server`: also ask INFO; a user without that permission would fill Redis's ACL log.

    Raises:
        RedisError: Redis does not answer, or refuses a command that a reader needs.
    """
    first = await _ask(redis, _first_questions(keys, server))
    names = {service: sorted(str(name, "utf-8") for name in first[f"names {service}"]) for service in SERVICES}
    recorded = {str(field, "ascii"): str(value, "utf-8") for field, value in first["shards"].items()}
    count = int(recorded.get(COUNT, 0))
    second = await _ask(redis, _second_questions(keys, names, count))
    blobs = first if blob_redis is None else await _ask(blob_redis, _blob_questions(keys))
    now = first["time"][0] + first["time"][1] / 1e6
    stages = tuple(
        StageView(
            service,
            tuple(
                _replica(name, second[f"lease {service} {name}"], second[f"expiry {service} {name}"], now)
                for name in names[service]
            ),
            _queue(QUEUES[service], first, now) if service in QUEUES else None,
        )
        for service in SERVICES
    )
    alive = {replica.name for replica in stages[-1].replicas if replica.state != "gone"}
    return PipelineView(
        namespace=keys.ns,
        at=now,
        stages=stages,
        shards=tuple(_shard(n, recorded.get(str(n), "0 "), second[f"shard {n}"], alive, now) for n in range(count)),
        control_length=first["control"],
        blobs=BlobsView(blobs["blobs"], int(blobs["blob bytes"] or 0)),
        redis=_redis(first.get("info")),
        batches=_batches(first["batches"], now),
    )


def problems(view: PipelineView) -> list[str]:
    """Describe what an operator should look at, a line each; nothing if all is well.

    A service with a work stream may be scaled to zero while the stream is empty; gateway and postproc may not. Replicas
    that stopped renewing their leases were not scaled away, and are named where no other is ready.
    """
    found = [line for stage in view.stages for line in _problems_of(stage)]
    found += [f"{key}: {REMEDY}" for key in view.misplaced]
    if view.stage("postproc").ready:
        found += [f"tokens:{shard.shard} has no living owner" for shard in view.shards if shard.owner is None]
    if view.redis and view.redis.max_bytes and view.redis.used_bytes > FULL * view.redis.max_bytes:
        full = "it refuses" if view.redis.policy == KEEPS_ALL else "it evicts"
        found.append(f"Redis uses {view.redis.used_bytes / view.redis.max_bytes:.0%} of its memory; full, {full}")
    if view.redis and view.redis.max_bytes and (view.redis.policy.startswith(ANY_KEY) or view.redis.evicted):
        found.append(f"Redis evicts keys when it is full ({view.redis.policy}, {view.redis.evicted} so far)")
    return found


def _problems_of(stage: StageView) -> list[str]:
    found = []
    queue = stage.queue
    coming = "; one is starting" if stage.within("starting") else ""
    silent = "".join(f"; {name} does not answer" for name in _silent(stage))
    if not stage.ready and (queue is None or queue.length or silent):
        work = f"{queue.length} requests for " if queue and queue.length else ""
        found.append(f"{work}{stage.service}: no replica is ready{silent}{coming}")
    elif queue and (queue.waiting_s or 0) > LONG_WAIT_S:
        found.append(f"{stage.service}: the oldest of {queue.waiting} has waited for {queue.waiting_s:.0f} s")
    if queue and queue.quarantined:
        found.append(f"quarantine:{queue.stream} has {queue.quarantined} entries, which ended replica after replica")
    found += [f"{each.name}: a lease of another version, which cannot be read" for each in stage.within(UNREADABLE)]
    return found


def _silent(stage: StageView) -> list[str]:
    """Return the names of replicas that neither renew their lease nor have left, which deletes their consumer."""
    known = {each.name for each in stage.replicas} | {NEWER}
    consumers = [each.name for each in stage.queue.consumers if each.name not in known] if stage.queue else []
    return [each.name for each in stage.within("gone")] + consumers


# ------------------------------------------------------------------------------------------------------- questions

_Questions = dict[str, Sequence[str | int]]


def _first_questions(keys: Keys, server: bool) -> _Questions:
    questions: _Questions = {"time": ("TIME",), "control": ("XLEN", keys.control())}
    if server:
        questions["info"] = ("INFO",)
    for service in SERVICES:
        questions[f"names {service}"] = ("SMEMBERS", keys.replicas(service))
    for service, stream in QUEUES.items():
        questions[f"queue {stream}"] = ("EVAL", read_script("queue_view"), 1, keys.stream(stream), service, WAITING)
        questions[f"consumers {stream}"] = ("XINFO CONSUMERS", keys.stream(stream), service)
        questions[f"quarantine {stream}"] = ("XLEN", keys.quarantine(stream))
    questions["shards"] = ("HGETALL", keys.shards())
    questions["batches"] = ("EVAL", read_script("batches_view"), 1, keys.batches(), keys.batch(""))
    return questions | _blob_questions(keys)


def _second_questions(keys: Keys, names: dict[str, list[str]], shards: int) -> _Questions:
    questions: _Questions = {}
    for service, members in names.items():
        for name in members:
            questions[f"lease {service} {name}"] = ("GET", keys.replica(service, name))
            questions[f"expiry {service} {name}"] = ("PTTL", keys.replica(service, name))
    for shard in range(shards):
        questions[f"shard {shard}"] = ("EVAL", read_script("queue_view"), 1, keys.tokens(shard), "", "")
    return questions


def _blob_questions(keys: Keys) -> _Questions:
    return {"blobs": ("ZCARD", keys.blobs()), "blob bytes": ("HGET", keys.blob_sizes(), "sum")}


async def _ask(redis: Redis, questions: _Questions) -> dict[str, Any]:
    """Ask all questions in one round trip. A stream or group that does not exist yet answers with nothing."""
    async with redis.pipeline(transaction=False) as pipe:
        for words in questions.values():
            pipe.execute_command(*words)
        answers = await pipe.execute(raise_on_error=False)
    named = dict(zip(questions, answers, strict=True))
    for name, answer in named.items():
        if isinstance(answer, NoPermissionError) and name == "info":
            named[name] = None
        elif isinstance(answer, ResponseError) and str(answer).startswith(("no such key", "NOGROUP")):
            named[name] = []
        elif isinstance(answer, Exception):
            raise answer
    return named


# --------------------------------------------------------------------------------------------------------- answers

_decoder = msgspec.json.Decoder(Replica)


def _replica(name: str, lease: bytes | None, expires_ms: int, now: float) -> ReplicaView:
    if lease is None:
        return ReplicaView(name, "gone")
    try:
        said = _decoder.decode(lease)
    except msgspec.MsgspecError:
        return ReplicaView(name, UNREADABLE, expires_s=expires_ms / 1000)
    up_s = max(0.0, now - said.started) if said.started else None
    return ReplicaView(name, said.state, said.version, up_s, max(0, expires_ms) / 1000, said.load)


def _queue(stream: str, answers: dict[str, Any], now: float) -> QueueView:
    length, oldest, pending, untaken, added = answers[f"queue {stream}"]
    consumers = [
        ConsumerView(str(each["name"], "utf-8"), each["pending"], each["idle"] / 1000)
        for each in answers[f"consumers {stream}"]
        if each["name"] != WAITING.encode()
    ]
    return QueueView(
        stream=stream,
        length=length,
        pending=pending,
        oldest_s=_age(oldest, now),
        waiting_s=_age(untaken, now),
        consumers=tuple(sorted(consumers, key=lambda consumer: consumer.name)),
        quarantined=answers[f"quarantine {stream}"],
        added=added,
    )


def _batches(answer: list[Any], now: float) -> BatchesView:
    working, waiting, lines, done, first = answer
    return BatchesView(working, waiting, lines, done, max(0.0, now - float(first)) if first else None)


def _shard(shard: int, recorded: str, answer: list[Any], alive: set[str], now: float) -> ShardView:
    epoch, _, owner = recorded.partition(" ")
    return ShardView(shard, answer[0], _age(answer[1], now), owner if owner in alive else None, int(epoch))


def _age(entry_id: bytes, now: float) -> float | None:
    return max(0.0, now - int(entry_id.partition(b"-")[0]) / 1000) if entry_id else None


def _redis(info: dict[str, Any] | None) -> RedisView | None:
    if info is None:
        return None
    return RedisView(
        version=f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])}",
        up_s=float(info["uptime_in_seconds"]),
        used_bytes=int(info["used_memory"]),
        max_bytes=int(info["maxmemory"]),
        clients=int(info["connected_clients"]),
        blocked=int(info["blocked_clients"]),
        ops_per_s=int(info["instantaneous_ops_per_sec"]),
        evicted=int(info["evicted_keys"]),
        kept_on_disk=bool(info["aof_enabled"]),
        policy=str(info.get("maxmemory_policy", KEEPS_ALL)),
    )
