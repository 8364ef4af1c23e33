"""Limits of tenants, decided in Redis so that all gateways agree: one script when a request comes, one when it ends.

The text of a prompt is charged when the request comes, its media and its answer when it ends. So a tenant may go into
debt by the answers that it has under way, and waits until that is paid. An answer that goes on without a client, or
whose gateway has died, is charged as its journal grows, by any gateway.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
from redis.asyncio import Redis

from services.gateway.errors import too_many
from services.gateway.tenants.headers import rate_headers, retry_headers
from services.gateway.tenants.key_file import Limits, Tenant
from services.gateway.tenants.metrics import TenantMetrics
from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.bus.retry import retry_until_available
from shared.errors import RequestError
from shared.messages import BATCH_PRIORITY, Share

HERE = Path(__file__).parent
LEFT_S = 5.0  # between two looks at what has been generated for clients that have left, by all gateways together
LEFT_COUNT = 100  # about so many requests are looked at by one call of a script, for a millisecond or two
EVERYONE = ""  # name of all requests together, with or without a tenant

_TEXTS = {
    "requests": "{limit} requests a minute",
    "tokens": "{limit} tokens a minute",
    "media": "{limit} bytes of media a minute",
    "concurrent": "{limit} requests at a time",
    "queued": "{limit} tokens of prompts that wait",
    "uploads": "{limit} bytes of uploads that are stored at a time, its share (tenant_share) of their room",
}


class Quota(msgspec.Struct):
    """Tenant of an HTTP request, and the headers that tell its client of limits; the edge sends them."""

    tenant: Tenant | None = None
    share: Share | None = None
    headers: dict[bytes, bytes] = {}


class Ceilings(msgspec.Struct, frozen=True):
    """Limits of the whole server, and the share of each that one tenant may take."""

    max_queue: int
    max_num_queued_tokens: int  # 0: no limit
    tenant_share: float
    uploads: int  # bytes

    def share(self, ceiling: int) -> int:
        """Return what one tenant may take."""
        return max(1, int(ceiling * self.tenant_share))


class Reservation(msgspec.Struct):
    """Requests that were admitted together, until they end."""

    tenant: Tenant | None
    ids: tuple[str, ...]
    charged: int  # tokens
    media: int = 0  # bytes of uploads that were charged
    begun: bool = False


class _Wanted(msgspec.Struct, frozen=True):
    """Argument of admit.lua."""

    ids: tuple[str, ...]
    requests: int
    tokens: int
    queued: int  # those of them that wait before others: none of a line of a batch, which all pass
    media: int
    limits: tuple[dict[str, int], ...]
    names: tuple[str, ...]
    gateway: str


class _Said(msgspec.Struct, omit_defaults=True):
    """Argument of settle.lua, for one name."""

    name: str
    begun: list[str]
    ended: list[str]
    tokens: int
    prompt: int
    generated: int
    limit: int | None = None
    media: int = 0  # bytes to give back
    media_limit: int | None = None
    left: dict[str, int] = {}

    def plus(self, later: "_Said | None") -> "_Said":
        """Return this and what was said later."""
        if later is None:
            return self
        return _Said(
            self.name,
            self.begun + later.begun,
            self.ended + later.ended,
            self.tokens + later.tokens,
            self.prompt + later.prompt,
            self.generated + later.generated,
            later.limit,
            self.media + later.media,
            later.media_limit,
            self.left | later.left,
        )


class Limiter:
    """Admission by the limits of tenants and of the server. Without either it does nothing and asks nobody."""

    def __init__(
        self, redis: Redis, keys: Keys, gateway: str, ceilings: Ceilings, metrics: TenantMetrics, *, has_tenants: bool
    ) -> None:
        """`gateway`: whose stream of deltas is there as long as it lives. `has_tenants`: there is a key file."""
        self._redis = redis
        self._keys = keys
        self._gateway = gateway
        self._ceilings = ceilings
        self._metrics = metrics
        self._admit = redis.register_script(read_script("admit", HERE))
        self._settle = redis.register_script(read_script("settle", HERE))
        self._charge_left = redis.register_script(read_script("charge_left", HERE))
        self._limits_somebody = has_tenants or bool(ceilings.max_num_queued_tokens)
        self._said: dict[str, _Said] = {}
        self._changed = asyncio.Event()

    async def admit(
        self, quota: Quota | None, model: str, ids: Sequence[str], tokens: int, media_bytes: int
    ) -> Reservation | None:
        """Admit the requests `ids`, which are one HTTP request; None if nothing limits or counts them.

        Raises:
            RequestError: 403, the tenant may not use this model; 429, beyond a limit.
            RedisError: Redis cannot decide.
        """
        tenant = None if quota is None else quota.tenant
        if tenant is not None:
            tenant.check_model(model)
        names = self._names(tenant)
        if not names:
            return None
        is_line = quota is not None and quota.share is not None and quota.share.priority == BATCH_PRIORITY
        await self._ask(quota, self._wanted(tenant, names, ids, tokens, 0 if is_line else tokens, media_bytes))
        return Reservation(tenant, tuple(ids), tokens, media_bytes)

    async def count(self, quota: Quota) -> None:
        """Admit a request that is answered at once, by the gateway alone: it counts, and takes no place.

        Raises:
            RequestError: 429, beyond a limit.
            RedisError: Redis cannot decide.
        """
        if (tenant := quota.tenant) is not None:
            await self._ask(quota, self._wanted(tenant, [tenant.name], (), 0, 0, 0))

    def _wanted(
        self, tenant: Tenant | None, names: list[str], ids: Sequence[str], tokens: int, queued: int, media: int
    ) -> _Wanted:
        limits = tuple(self._limits(tenant if name else None) for name in names)
        return _Wanted(tuple(ids), len(ids) or 1, tokens, queued, media, limits, tuple(names), self._gateway)

    async def _ask(self, quota: Quota | None, wanted: _Wanted) -> None:
        args: list[str | bytes] = [self._keys.request(""), msgspec.json.encode(wanted)]
        verdict = await self._admit(keys=self._redis_keys(wanted.names), args=args)
        limit, place, retry_ms, *rates = verdict
        tenant = None if quota is None else quota.tenant
        if tenant is not None and quota is not None:
            quota.headers.update(rate_headers(wanted.limits[0], rates))
        if limit:
            raise self._refusal(quota, str(limit, "ascii"), wanted.limits[place - 1], wanted.names[place - 1], retry_ms)
        if tenant is not None:
            self._metrics.requests.labels(tenant.name).inc(wanted.requests)

    def begin(self, reservation: Reservation) -> None:
        """Note that the first token of an answer is here: its prompt waits no more."""
        if reservation.begun:
            return
        reservation.begun = True
        for name in self._names(reservation.tenant):
            self._about(name, reservation.tenant).begun.extend(reservation.ids[:1])
        self._changed.set()

    def end(
        self,
        reservation: Reservation,
        prompt: int,
        generated: int,
        *,
        left: Mapping[str, int] = MappingProxyType({}),
        stored: bool = True,
    ) -> None:
        """Note that the requests have ended, with so many tokens of the prompt and of all answers.

        `left`: those whose client alone has left, and may come back, with the tokens of their answers so far. They stay
        open, and what is generated from now on is charged as well.
        `stored`: False if their uploads are not kept, since they were never sent; then those bytes are given back.
        """
        for name in self._names(reservation.tenant):
            said = self._about(name, reservation.tenant)
            said.ended.extend(id for id in reservation.ids if id not in left)
            said.left.update(left)
            said.tokens += prompt + generated - reservation.charged
            said.prompt += prompt
            said.generated += generated
            said.media += 0 if stored else reservation.media
        if reservation.tenant is not None:
            self._metrics.tokens.labels(reservation.tenant.name, "prompt").inc(prompt)
            self._metrics.tokens.labels(reservation.tenant.name, "generated").inc(generated)
        self._changed.set()

    async def run(self) -> None:
        """Write to Redis what `begin` and `end` have noted, until cancelled. A Redis that is down is waited for."""
        while True:
            await self._changed.wait()
            await retry_until_available("settle", self.flush)

    async def watch_left(self) -> None:
        """Charge what is generated for clients that have left or whose gateway has died, until cancelled."""
        while True:
            await asyncio.sleep(LEFT_S)
            if self._limits_somebody:
                await retry_until_available("charge", self.charge_in_turn)

    async def charge_in_turn(self) -> None:
        """Charge it unless another gateway has looked within LEFT_S, about.

        Raises:
            RedisError: it is not known whether it was charged, and will be.
        """
        until_next_ms = max(1, int(900 * LEFT_S))
        if await self._redis.set(self._keys.tenants_looked(), self._gateway, nx=True, px=until_next_ms):
            await self.charge_left()

    async def charge_left(self) -> None:
        """Charge it now. Several gateways may: each token is charged once.

        Raises:
            RedisError: it is not known whether it was charged, and will be.
        """
        own = self._keys
        prefixes = [own.request(""), own.journal(""), own.tenant(""), own.deltas("")]
        cursor = b"0"
        while True:
            args: list[str | bytes | int] = [*prefixes, cursor, LEFT_COUNT]
            cursor, *charged = await self._charge_left(keys=[own.tenants_left()], args=args)
            for name, tokens in zip(charged[::2], charged[1::2], strict=True):
                if name:
                    self._metrics.tokens.labels(str(name, "ascii"), "generated").inc(tokens)
            if cursor == b"0":
                return

    async def flush(self) -> None:
        """Write it now. What fails is kept; a write whose reply is lost is made again, and counts twice.

        Raises:
            RedisError: nothing is known to be written.
        """
        self._changed.clear()
        said = dict(self._said)
        if not said:
            return
        self._said.clear()
        try:
            await self._settle(keys=self._redis_keys(said), args=[msgspec.json.encode(each) for each in said.values()])
        except BaseException:
            for name, each in said.items():
                self._said[name] = each.plus(self._said.get(name))
            raise

    def _names(self, tenant: Tenant | None) -> list[str]:
        """Return the names under which a request counts."""
        own = [] if tenant is None else [tenant.name]
        return [*own, EVERYONE] if self._ceilings.max_num_queued_tokens else own

    def _redis_keys(self, names: Iterable[str]) -> list[str]:
        """Return the KEYS of the scripts."""
        keys = [key for name in names for key in (self._keys.tenant(name), self._keys.tenant_open(name))]
        return [*keys, self._keys.tenants_left()]

    def _limits(self, tenant: Tenant | None) -> dict[str, int]:
        ceilings = self._ceilings
        if tenant is None:
            return {"queued": ceilings.max_num_queued_tokens}
        own = tenant.limits
        queued = [own.queued_tokens]
        if ceilings.max_num_queued_tokens:
            queued.append(ceilings.share(ceilings.max_num_queued_tokens))
        limits = {
            "requests": own.requests_per_min,
            "tokens": own.tokens_per_min,
            "media": own.media_bytes_per_min,
            "concurrent": _least(own.concurrent_requests, ceilings.share(ceilings.max_queue)),
            "queued": _least(*queued),
            "uploads": ceilings.share(ceilings.uploads),
        }
        return {name: limit for name, limit in limits.items() if limit is not None}

    def _about(self, name: str, tenant: Tenant | None) -> _Said:
        limits = tenant.limits if name and tenant is not None else Limits()
        nothing = _Said(name, [], [], 0, 0, 0, limits.tokens_per_min, media_limit=limits.media_bytes_per_min)
        return self._said.setdefault(name, nothing)

    def _refusal(
        self, quota: Quota | None, limit: str, limits: dict[str, int], name: str, retry_ms: int
    ) -> RequestError:
        self._metrics.refusals.labels(name, limit).inc()
        if quota is not None:
            quota.headers.update(retry_headers(retry_ms))
        whose = f"The API key {name!r}" if name else "The server"
        text = _TEXTS[limit].format(limit=limits[limit])
        return too_many(f"{whose} has a limit of {text}; try again in {math.ceil(retry_ms / 1000)} s.")


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
