"""Find keys, entries and open requests that remain when no request is under way any more."""

import asyncio

from chaos_garbage import sweep
from chaos_system import REQUEST_TIMEOUT_S, RETAIN_S, System

from shared.bus import leases
from shared.bus.keys import ENCODE, GENERATE

SETTLE_LOOK_S = 0.5
GROUPS = {ENCODE: "mm_encoder", GENERATE: "engine"}
# What each service says of its open requests in its lease.
OPEN = {
    "gateway": ("requests", "choices"),
    "mm_encoder": ("running",),
    "engine": ("held",),
    "postproc": ("open",),
}
# What lasts: streams, who is there, who owns which shard, and embeddings, which are a cache with a budget.
LASTING = (
    "encode",
    "generate",
    "tokens:",
    "control",
    "replica:",
    "replicas:",
    "shards",
    "blob:embeds:",
    "blobs",
    "tenant:",
    "tenants:",  # whose fields `_charged` looks at
    "batch:",  # for files_keep_s after its end, and what it has beside itself is looked for by chaos_batches
    "batches:of:",
    "files:sizes",
)
# What may be there when it is about to go: answers kept for clients that come back, and streams of dead gateways.
LATEST_S = {
    # Of several choices, one that ends early is kept for the others' sake.
    **dict.fromkeys(("request", "journal", "logprobs", "idempotency"), 2 * REQUEST_TIMEOUT_S + RETAIN_S + 1),
    "deltas": 3600.0,
}
MAX_TOKENS_STREAM = 400  # entries: XTRIM takes whole nodes of a hundred


async def wait_until_clean(system: System, seconds: float, *, uploads: bool = True) -> list[str]:
    """Return what is still there after at most `seconds`; empty as soon as nothing is.

    `uploads` count as left behind, unless a gateway was killed: what it had stored for a request that it did not live
    to submit has an expiry, and nobody else knows of it.
    """
    for _ in range(int(seconds / SETTLE_LOOK_S)):
        await sweep(system)  # garbage comes into the quarantine only when its stream is read that far
        left = [one for one in await leftovers(system) if uploads or not one.startswith("key blob")]
        if not left:
            break
        await asyncio.sleep(SETTLE_LOOK_S)
    return left


async def leftovers(system: System) -> list[str]:
    """One line for each thing that has outlived its request or its replica, or that Redis has refused a service."""
    return [
        *(f"refused {noted['username']}: {noted['object']}" for noted in await system.redis.acl_log()),
        *await _keys(system),
        *await _charged(system),
        *await _entries(system),
        *await _open(system),
    ]


async def _keys(system: System) -> list[str]:
    redis, prefix = system.redis, f"{system.keys.ns}:"
    names = sorted([key.decode().removeprefix(prefix) async for key in redis.scan_iter(count=1000)])
    left = []
    for name in names:
        expires_s = await redis.ttl(prefix + name)
        if not name.startswith(LASTING) and not 0 <= expires_s <= LATEST_S.get(name.partition(":")[0], -1.0):
            left.append(f"key {name}, which {f'expires in {expires_s} s' if expires_s >= 0 else 'stays'}")
    shards = [name for name in names if name.startswith("tokens:")]
    lengths = {name: int(await redis.xlen(prefix + name)) for name in shards}
    return left + [f"{name} has {length} entries" for name, length in lengths.items() if length > MAX_TOKENS_STREAM]


async def _charged(system: System) -> list[str]:
    """Requests that are still charged without a client, but for those of a gateway whose stream is there.

    That of a killed one expires within a minute, for which nobody waits here.
    """
    left = []
    entries: dict[bytes, bytes] = await system.redis.hgetall(system.keys.tenants_left())  # type: ignore[assignment]
    for field, value in entries.items():
        gateway = value.decode().split(":", 2)[2:]
        if not gateway or not await system.redis.exists(system.keys.deltas(gateway[0])):
            left.append(f"{field.decode()!r} is charged, {value.decode()}")
    return left


async def _entries(system: System) -> list[str]:
    left = []
    for stream, group in GROUPS.items():
        key = system.keys.stream(stream)
        if length := await system.redis.xlen(key):
            left.append(f"{stream} has {length} entries")
        if not await system.redis.exists(key):
            continue
        alive = {replica.name for replica in system.of(group) if replica.running}
        for consumer in await system.redis.xinfo_consumers(key, group):
            name, pending = consumer["name"].decode(), consumer["pending"]
            if pending:
                left.append(f"{stream}: {pending} entries pending for {name}")
            if name not in alive:
                left.append(f"{stream}: consumer of the dead {name}")
    return left


async def _open(system: System) -> list[str]:
    left = []
    for service, figures in OPEN.items():
        for replica in await leases.live(system.redis, system.keys, service):
            left += [
                f"{replica.name}: {name} is {replica.load[name]:g}" for name in figures if replica.load.get(name, 0)
            ]
            if replica.name not in {one.name for one in system.of(service) if one.running}:
                left.append(f"lease of the dead {replica.name}")
    return left
