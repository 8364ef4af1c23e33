"""The limits of tenants in a real Redis, as two gateways decide them."""

from itertools import count
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.gateway.tenants.key_file import Limits, Tenant
from services.gateway.tenants.limiter import Ceilings, Limiter, Quota, Reservation
from services.gateway.tenants.metrics import TenantMetrics
from shared.bus.client import command
from shared.bus.keys import Keys
from shared.errors import RequestError
from shared.messages import BATCH_PRIORITY, Share


def tenant(name: str = "alice", models: tuple[str, ...] = (), **limits: int) -> Tenant:
    return Tenant(name=name, hashes=("sha256:" + 64 * "0",), models=models, limits=Limits(**limits))


NUMBERS = count(1)


class Gateway:
    """The limiter of one gateway."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        max_queue: int = 4096,
        queued: int = 0,
        share: float = 0.5,
        uploads: int = 1 << 30,
    ) -> None:
        self.registry = CollectorRegistry()
        ceilings = Ceilings(max_queue, queued, share, uploads)
        self.address = f"g{next(NUMBERS)}"
        self.limiter = Limiter(redis, keys, self.address, ceilings, TenantMetrics(self.registry), has_tenants=True)
        self.headers: dict[str, str] = {}
        self._count = 0

    async def ask(
        self,
        who: Tenant | None,
        *ids: str,
        tokens: int = 10,
        media: int = 0,
        model: str = "m",
        share: Share | None = None,
    ) -> Reservation | None:
        self._count += 1
        quota = Quota(who, share)
        try:
            return await self.limiter.admit(quota, model, ids or (f"{id(self)}-{self._count}",), tokens, media)
        finally:
            self.headers = {name.decode(): value.decode() for name, value in quota.headers.items()}

    async def refused(self, who: Tenant | None, **asked: Any) -> str:
        with pytest.raises(RequestError) as error:
            await self.ask(who, **asked)
        assert error.value.failure.status == 429
        return error.value.failure.message


@pytest.fixture
def one(redis: Redis, keys: Keys) -> Gateway:
    return Gateway(redis, keys)


@pytest.fixture
def two(redis: Redis, keys: Keys) -> Gateway:
    return Gateway(redis, keys)


async def test_without_tenants_and_limits_redis_is_not_asked(redis: Redis, one: Gateway) -> None:
    before = (await redis.info("stats"))["total_commands_processed"]
    assert await one.ask(None) is None
    assert (await redis.info("stats"))["total_commands_processed"] == before + 1  # the INFO itself


async def test_two_gateways_agree_on_requests_a_minute(one: Gateway, two: Gateway) -> None:
    alice = tenant(requests_per_min=3)
    await one.ask(alice)
    assert one.headers["x-ratelimit-limit-requests"] == "3"
    assert one.headers["x-ratelimit-remaining-requests"] == "2"
    assert one.headers["x-ratelimit-reset-requests"].endswith("s")
    await two.ask(alice)
    await one.ask(alice)
    assert "3 requests a minute" in await two.refused(alice)
    assert two.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(two.headers["retry-after"]) <= 20  # one of three comes back every 20 s
    assert 0 < int(two.headers["retry-after-ms"]) <= 20_000
    await one.ask(tenant("bob", requests_per_min=3))  # is another


async def test_choices_count(one: Gateway) -> None:
    alice = tenant(requests_per_min=3)
    await one.ask(alice, "a", "a-1", "a-2")
    await one.refused(alice)


async def test_a_refusal_charges_nothing(one: Gateway) -> None:
    alice = tenant(requests_per_min=1000, media_bytes_per_min=100)
    await one.ask(alice, media=100)
    assert "100 bytes of media" in await one.refused(alice, media=1)
    await one.ask(alice)
    assert one.headers["x-ratelimit-remaining-requests"] == "998"


async def test_answers_are_charged_when_they_end_and_may_lead_into_debt(one: Gateway, two: Gateway) -> None:
    alice = tenant(tokens_per_min=1000)
    reservation = await one.ask(alice, tokens=100)
    assert one.headers["x-ratelimit-remaining-tokens"] == "900"
    assert reservation is not None
    one.limiter.end(reservation, prompt=150, generated=2000)
    await one.limiter.flush()
    assert "1000 tokens a minute" in await two.refused(alice, tokens=1)
    assert 60 < int(two.headers["retry-after"]) <= 70  # 1150 tokens of debt at 1000 a minute, and one more


async def test_a_request_that_never_ran_gets_its_tokens_back(one: Gateway) -> None:
    alice = tenant(tokens_per_min=1000)
    reservation = await one.ask(alice, tokens=1000)
    assert reservation is not None
    one.limiter.end(reservation, prompt=0, generated=0)
    await one.limiter.flush()
    await one.ask(alice, tokens=900)


@pytest.mark.parametrize("stored", [True, False])
async def test_uploads_that_were_not_stored_are_given_back(
    redis: Redis, keys: Keys, one: Gateway, two: Gateway, stored: bool
) -> None:
    alice = tenant(media_bytes_per_min=1000)
    for _ in range(2):  # both are noted before either is written
        reservation = await one.ask(alice, media=500)
        assert reservation is not None
        one.limiter.end(reservation, 0, 0, stored=stored)
    await one.limiter.flush()
    assert await redis.hget(keys.tenant("alice"), "used:media") == (b"1000" if stored else b"0")
    if stored:
        assert "1000 bytes of media" in await two.refused(alice, media=900)
    else:
        await two.ask(alice, media=900)


async def test_a_prompt_above_the_limit_passes_once_the_allowance_is_whole(one: Gateway) -> None:
    alice = tenant(tokens_per_min=100)
    await one.ask(alice, tokens=1000)
    await one.refused(alice, tokens=1)
    assert int(one.headers["retry-after"]) > 500


async def test_requests_at_a_time_over_all_gateways(one: Gateway, two: Gateway) -> None:
    alice = tenant(concurrent_requests=2)
    first = await one.ask(alice)
    await two.ask(alice)
    assert "2 requests at a time" in await two.refused(alice)
    assert first is not None
    one.limiter.end(first, 1, 1)
    await one.limiter.flush()
    await two.ask(alice)


async def test_a_tenant_has_a_share_of_the_queue(redis: Redis, keys: Keys) -> None:
    gateway = Gateway(redis, keys, max_queue=4)
    await gateway.ask(tenant())
    await gateway.ask(tenant())
    assert "2 requests at a time" in await gateway.refused(tenant())
    await gateway.ask(tenant("bob"))


async def test_places_of_requests_whose_gateway_died_are_found_again(redis: Redis, keys: Keys, one: Gateway) -> None:
    alice = tenant(concurrent_requests=2)
    await one.ask(alice, "ended")
    await one.ask(alice, "runs")
    await redis.hset(keys.request("ended"), mapping={"epoch": "1", "finish": "..."})
    await redis.hset(keys.request("runs"), "epoch", "1")
    await one.ask(alice, "new")  # in the place of the one that has ended
    await one.refused(alice)
    assert set(await redis.hkeys(keys.tenant_open("alice"))) == {b"runs", b"new"}


async def test_queued_tokens_until_an_answer_begins(redis: Redis, keys: Keys) -> None:
    gateway = Gateway(redis, keys, queued=1000)
    alice, bob = tenant(queued_tokens=300), tenant("bob")
    first = await gateway.ask(alice, tokens=200)
    assert "300 tokens of prompts" in await gateway.refused(alice, tokens=200)
    assert first is not None
    gateway.limiter.begin(first)
    gateway.limiter.begin(first)  # of another choice
    await gateway.limiter.flush()
    await gateway.ask(alice, tokens=200)
    await gateway.ask(bob, tokens=400)
    assert "500 tokens of prompts" in await gateway.refused(bob, tokens=200)  # half of the server's
    await gateway.ask(None, tokens=400)
    text = await gateway.refused(None, tokens=1)
    assert text.startswith("The server has a limit of 1000 tokens")


async def test_lines_of_batches_take_nobody_s_place_among_queued_tokens(redis: Redis, keys: Keys) -> None:
    gateway = Gateway(redis, keys, queued=1000)
    alice, line = tenant(queued_tokens=300, tokens_per_min=2000), Share("alice", priority=BATCH_PRIORITY)
    await gateway.ask(alice, tokens=900, share=line)
    await gateway.ask(alice, tokens=900, share=line)
    assert "2000 tokens a minute" in await gateway.refused(alice, tokens=300, share=line)
    await gateway.ask(alice, tokens=100, share=Share("alice"))
    assert "300 tokens of prompts" in await gateway.refused(tenant(queued_tokens=300), tokens=250)
    await gateway.ask(None, tokens=900)


async def test_a_prompt_above_the_limit_is_let_in_when_nothing_waits(redis: Redis, keys: Keys) -> None:
    gateway = Gateway(redis, keys, queued=1000)
    reservation = await gateway.ask(None, tokens=5000)
    await gateway.refused(None, tokens=1)
    assert reservation is not None
    gateway.limiter.end(reservation, 5000, 1)
    await gateway.limiter.flush()
    await gateway.ask(None, tokens=1000)


async def test_models(one: Gateway) -> None:
    alice = tenant(models=("small",))
    await one.ask(alice, model="small")
    with pytest.raises(RequestError) as refused:
        await one.ask(alice, model="large")
    assert (refused.value.failure.status, refused.value.failure.code) == (403, "model_not_allowed")


async def test_usage_is_counted(redis: Redis, keys: Keys, one: Gateway) -> None:
    alice = tenant(requests_per_min=2)
    first = await one.ask(alice, "a", "a-1", tokens=10, media=7)
    await one.refused(alice)
    assert first is not None
    one.limiter.end(first, 12, 30)
    await one.limiter.flush()
    fields = await redis.hgetall(keys.tenant("alice"))
    used = {name.decode(): int(value) for name, value in fields.items() if name.startswith(b"used:")}
    assert used == {
        "used:requests": 2,
        "used:refused": 1,
        "used:media": 7,
        "used:prompt": 12,
        "used:generated": 30,
    }
    assert one.registry.get_sample_value("millrace_key_tokens_total", {"key": "alice", "kind": "generated"}) == 30
    assert one.registry.get_sample_value("millrace_key_refusals_total", {"key": "alice", "limit": "requests"}) == 1


async def test_what_is_answered_here_counts_and_takes_no_place(redis: Redis, keys: Keys, one: Gateway) -> None:
    alice = tenant(requests_per_min=2, concurrent_requests=1)
    await one.limiter.count(Quota(None))
    await one.ask(alice)
    await one.limiter.count(quota := Quota(alice))
    assert quota.headers[b"x-ratelimit-remaining-requests"] == b"0"
    with pytest.raises(RequestError, match="'alice' has a limit of 2 requests a minute"):
        await one.limiter.count(Quota(alice))
    assert await redis.hlen(keys.tenant_open("alice")) == 1
    assert await redis.hmget(keys.tenant("alice"), "used:requests", "used:refused") == [b"2", b"1"]


async def test_uploads_have_a_share_of_their_room_until_their_requests_end(redis: Redis, keys: Keys) -> None:
    gateway = Gateway(redis, keys, uploads=1000)
    alice, bob = tenant(), tenant("bob")
    first = await gateway.ask(alice, "a", "a-1", media=400)
    assert "500 bytes of uploads" in await gateway.refused(alice, media=101)
    await gateway.ask(alice, media=100)
    await gateway.ask(alice)
    await gateway.ask(bob, media=900)  # more than its share, and nothing else of its
    assert "tenant_share" in await gateway.refused(bob, media=1)
    assert first is not None
    gateway.limiter.end(first, 1, 1)
    await gateway.limiter.flush()
    await gateway.ask(alice, media=400)


async def test_uploads_that_an_older_gateway_has_ended_take_no_room(redis: Redis, keys: Keys) -> None:
    gateway = Gateway(redis, keys, uploads=1000)
    await gateway.ask(tenant(), "a", media=500)
    await redis.hdel(keys.tenant_open("alice"), "a")
    await gateway.ask(tenant(), media=500)
    assert await redis.hlen(f"{keys.tenant_open('alice')}:uploads") == 1


async def left_alone(redis: Redis, keys: Keys, gateway: Gateway, who: Tenant, request_id: str, generated: int) -> None:
    """Submit a request whose client leaves after some tokens, and may come back."""
    reservation = await gateway.ask(who, request_id, tokens=100)
    assert reservation is not None
    await redis.hset(keys.request(request_id), "epoch", "1")
    await redis.setrange(keys.journal(request_id), 0, bytes(4 * generated))
    gateway.limiter.end(reservation, 100, generated, left={request_id: generated})
    await gateway.limiter.flush()


async def test_what_is_generated_for_a_client_that_left_is_charged_once_and_its_place_is_freed(
    redis: Redis, keys: Keys, one: Gateway, two: Gateway
) -> None:
    alice = tenant(tokens_per_min=100)
    await left_alone(redis, keys, one, alice, "r", 40)
    await two.ask(tenant("bob"))
    for generated, charged in ((40, 40), (700, 700), (700, 700)):
        await redis.setrange(keys.journal("r"), 0, bytes(4 * generated))
        for gateway in (one, two):
            await gateway.limiter.charge_left()
        assert int(await redis.hget(keys.tenant("alice"), "used:generated")) == charged
    assert await redis.hkeys(keys.tenant_open("alice")) == [b"r"]
    await redis.setrange(keys.journal("r"), 0, bytes(4 * 1000))
    await redis.hset(keys.request("r"), "finish", "x")
    await two.limiter.charge_left()
    assert int(await redis.hget(keys.tenant("alice"), "used:generated")) == 1000
    assert "100 tokens a minute" in await two.refused(alice, tokens=1)
    assert await redis.exists(keys.tenant_open("alice"), keys.tenants_left()) == 0
    labels = {"key": "alice", "kind": "generated"}
    told = [gateway.registry.get_sample_value("millrace_key_tokens_total", labels) or 0 for gateway in (one, two)]
    assert sum(told) == 1000


async def test_one_without_a_record_is_forgotten_and_what_cannot_be_read_as_well(
    redis: Redis, keys: Keys, one: Gateway
) -> None:
    await left_alone(redis, keys, one, tenant(), "gone", 40)
    await redis.delete(keys.request("gone"))
    await redis.hset(keys.tenants_left(), mapping={"no space": "1:0:0", "alice damaged": "x", "": ""})
    await one.limiter.charge_left()
    assert await redis.exists(keys.tenant_open("alice"), keys.tenants_left()) == 0
    await redis.set(keys.tenants_left(), "x")
    await one.limiter.charge_left()
    await left_alone(redis, keys, one, tenant(), "r", 40)
    assert await redis.hkeys(keys.tenants_left()) == [b"alice r"]


async def alive(redis: Redis, keys: Keys, gateway: Gateway) -> None:
    """Make its stream of deltas, which is there as long as it lives."""
    await redis.xadd(keys.deltas(gateway.address), {"v": "1"})


async def generate(redis: Redis, keys: Keys, request_id: str, tokens: int) -> None:
    await redis.hset(keys.request(request_id), "epoch", "1")
    await redis.setrange(keys.journal(request_id), 0, bytes(4 * tokens))


async def test_what_a_killed_gateway_had_open_is_charged(redis: Redis, keys: Keys, one: Gateway, two: Gateway) -> None:
    alice = tenant(tokens_per_min=1000, media_bytes_per_min=1000)
    await alive(redis, keys, one)
    await one.ask(alice, "r", "r-1", tokens=100, media=10)
    await generate(redis, keys, "r", 40)
    await generate(redis, keys, "r-1", 20)
    await two.limiter.charge_left()
    assert await redis.hget(keys.tenant("alice"), "used:generated") is None, "its gateway charges it"
    await redis.delete(keys.deltas(one.address))
    await two.limiter.charge_left()
    assert await redis.hget(keys.tenant("alice"), "used:generated") == b"60"
    await generate(redis, keys, "r", 950)
    for request_id in ("r", "r-1"):
        await redis.hset(keys.request(request_id), "finish", "x")
    await two.limiter.charge_left()
    assert await redis.hget(keys.tenant("alice"), "used:generated") == b"970"
    assert "1000 tokens a minute" in await two.refused(alice, tokens=1)
    open_key = keys.tenant_open("alice")
    assert await redis.exists(open_key, f"{open_key}:uploads", keys.tenants_left()) == 0
    assert await redis.hmget(keys.tenant("alice"), "queued", "uploads") == [None, None]


@pytest.mark.parametrize("admitted", ["just now", "long ago", "swept"])
@pytest.mark.parametrize("submitted", [False, True])
async def test_what_a_living_gateway_does_not_know_to_be_open_is_forgotten(
    redis: Redis, keys: Keys, one: Gateway, two: Gateway, submitted: bool, admitted: str
) -> None:
    """The reply to its admission was lost. What has a record it knows, and takes out itself."""
    await alive(redis, keys, one)
    await one.ask(tenant(), "r", tokens=100, media=10)
    if submitted:
        await redis.hset(keys.request("r"), "epoch", "1")
    open_key = keys.tenant_open("alice")
    if admitted == "long ago":
        value = (await redis.hget(open_key, "r")).decode()
        tokens, _, microseconds = value.partition(":")
        await redis.hset(open_key, "r", f"{tokens}:{int(microseconds) - 61_000_000}")
    elif admitted == "swept":
        await redis.delete(open_key)
    await two.limiter.charge_left()
    forgotten = not submitted and admitted != "just now"
    assert await redis.exists(keys.tenants_left()) == (not forgotten)
    if forgotten:
        assert await redis.exists(open_key, f"{open_key}:uploads") == 0


async def test_what_is_left_expires_where_nobody_has_limits_any_more(
    redis: Redis, keys: Keys, one: Gateway, two: Gateway
) -> None:
    """As after an update of all gateways that takes the file of keys away: none of these looks."""
    reservation = await one.ask(tenant(), "r")
    assert reservation is not None

    async def expires() -> bool:
        seconds = await redis.ttl(keys.tenants_left())
        await redis.persist(keys.tenants_left())
        return 0 < seconds <= 86400

    assert await expires()
    one.limiter.end(reservation, 1, 1, left={"r": 1})
    await one.limiter.flush()
    assert await expires()
    await redis.hset(keys.request("r"), "epoch", "1")
    await two.limiter.charge_left()
    assert await expires()


@pytest.mark.parametrize("lives", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_each_token_is_charged_once_though_a_gateway_seemed_dead(
    redis: Redis, keys: Keys, one: Gateway, two: Gateway, lives: bool, leaves: bool
) -> None:
    alice = tenant(tokens_per_min=1000)
    if lives:
        await alive(redis, keys, one)
    reservation = await one.ask(alice, "r", tokens=100)
    assert reservation is not None
    await generate(redis, keys, "r", 40)
    await two.limiter.charge_left()
    assert (await redis.hget(keys.tenant("alice"), "used:generated") == b"40") is not lives
    one.limiter.end(reservation, 100, 50, left={"r": 50} if leaves else {})
    await one.limiter.flush()
    assert await redis.hget(keys.tenant("alice"), "used:generated") == b"50"
    await generate(redis, keys, "r", 70)
    await two.limiter.charge_left()
    assert await redis.hget(keys.tenant("alice"), "used:generated") == (b"70" if leaves else b"50")
    assert await redis.hkeys(keys.tenants_left()) == ([b"alice r"] if leaves else [])
    await two.limiter.count(quota := Quota(alice))
    assert int(quota.headers[b"x-ratelimit-remaining-tokens"]) in range(830 if leaves else 850, 860)


async def test_many_are_charged_in_several_calls(
    redis: Redis, keys: Keys, one: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        for n in range(1000):
            pipe.hset(keys.request(f"r{n}"), "epoch", "1")
            pipe.setrange(keys.journal(f"r{n}"), 0, bytes(8))
            pipe.hset(keys.tenants_left(), f"alice r{n}", "1:0")
        await pipe.execute()
    calls, script = [], one.limiter._charge_left

    async def counted(**words: Any) -> Any:
        calls.append(reply := await script(**words))
        return reply

    monkeypatch.setattr(one.limiter, "_charge_left", counted)
    for _ in range(2):
        await one.limiter.charge_left()
        assert await redis.hget(keys.tenant("alice"), "used:generated") == b"1000"
    assert len(calls) > 10
    assert max(map(len, calls[: len(calls) // 2])) < 2 * 200


async def test_one_gateway_looks_and_the_next_one_later(redis: Redis, keys: Keys, one: Gateway, two: Gateway) -> None:
    await left_alone(redis, keys, one, tenant(), "r", 40)
    await one.limiter.charge_in_turn()
    await generate(redis, keys, "r", 70)
    await two.limiter.charge_in_turn()
    assert await redis.hget(keys.tenant("alice"), "used:generated") == b"40"
    assert 0 < await redis.pttl(keys.tenants_looked()) < 5000
    await redis.delete(keys.tenants_looked())
    await two.limiter.charge_in_turn()
    assert await redis.hget(keys.tenant("alice"), "used:generated") == b"70"


async def commands(redis: Redis) -> int:
    """How many commands Redis has run, those in scripts included."""
    return sum(each["calls"] for each in (await redis.info("commandstats")).values())


async def test_an_admission_costs_the_same_beside_many_uploads(redis: Redis, keys: Keys, one: Gateway) -> None:
    await one.ask(tenant(), "first", media=10)
    costs = []
    for n in range(40):
        before = await commands(redis)
        await one.ask(tenant(), f"r{n}", media=10)
        costs.append(await commands(redis) - before)
    assert len(set(costs[1:])) == 1
    assert await redis.hget(keys.tenant("alice"), "uploads") == b"410"


async def test_uploads_that_an_older_gateway_has_counted_alone_are_counted(redis: Redis, keys: Keys) -> None:
    gateway = Gateway(redis, keys, uploads=1000)
    await redis.hset(keys.request("old"), "epoch", "1")
    await redis.hset(keys.tenant_open("alice"), "old", "0:1")
    await redis.hset(f"{keys.tenant_open('alice')}:uploads", "old", "400")
    await gateway.refused(tenant(), media=101)
    await gateway.ask(tenant(), media=100)


@pytest.mark.parametrize("damage", [("SET", "x"), ("RPUSH", "x")])
async def test_damaged_keys_begin_anew(redis: Redis, keys: Keys, one: Gateway, damage: tuple[str, str]) -> None:
    for key in (keys.tenant("alice"), keys.tenant_open("alice"), f"{keys.tenant_open('alice')}:uploads"):
        await command(redis, damage[0], key, damage[1])
    await one.ask(tenant(requests_per_min=2, concurrent_requests=3), media=5)
    await redis.hset(keys.tenant("alice"), mapping={"requests": "x", "queued": "y"})
    await redis.hset(keys.tenant_open("alice"), "z", "z")
    await one.ask(tenant(requests_per_min=2, concurrent_requests=3))
