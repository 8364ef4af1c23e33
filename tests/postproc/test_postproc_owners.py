"""Whatever dies, stops, wakes and takes over, and wherever: a gateway that follows the rule shows the answer that would
have been shown without, once."""

import asyncio
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from postproc_owners import LOGPROBS, TOKENS, WORDS, WRITES, Client, World
from postproc_stand_in import EOS, Shown

from cli.redis_server import RedisServer
from services.postproc.answer import Answer, Parsers
from services.postproc.detokenize import Vocabulary
from shared import bus
from shared.keys import Keys
from shared.messages import Begin, Finish, Request

points = st.builds("{}.{}".format, st.sampled_from(WRITES), st.sampled_from(["before", "after"]))
which = st.integers(0, 5)
actions = st.one_of(
    st.tuples(st.just("generate"), st.integers(1, 9)),
    st.tuples(st.just("turn"), which),
    st.tuples(st.just("turn"), which, points),
    st.tuples(st.just("turn"), which, st.just(""), points),
    st.tuples(st.just("start")),
    st.tuples(st.just("wake"), which, st.booleans()),
    st.tuples(st.just("replace_engine")),
    st.tuples(st.just("finish")),
    st.tuples(st.just("read"), which),
    st.tuples(st.just("come_back"), which),
    st.tuples(st.just("miss"), which),
)


def whole(one: Request) -> Shown:
    """The answer as the pure pipeline has it."""
    answer = Answer(one, Vocabulary(WORDS), Parsers())
    answer.begin = Begin(one.id, 1, 0, 7, 3, 2, 1)
    for token, logprob in zip(TOKENS, LOGPROBS, strict=False):
        answer.push(token, logprob)
    answer.push_stop_token(EOS)
    answer.finish(Finish("stop", EOS))
    shown, delta = Shown(), answer.take()
    assert delta is not None
    shown.add(delta)
    return shown


async def do(world: World, action: tuple[Any, ...]) -> None:
    match action:
        case ("generate", number):
            await world.generate(number)
        case ("turn", which, *at):
            await world.turn(which, *at)
        case ("start",):
            await world.start()
        case ("wake", which, renew):
            await world.wake(which, renew)
        case ("replace_engine",):
            await world.replace_engine()
        case ("finish",):
            await world.finish()
        case (what, which) if what == "read" or world.retains:  # else there is nothing to come back to after the end
            client = world.clients[which % len(world.clients)]
            await {"read": client.read, "come_back": client.connect, "miss": client.miss}[what]()


async def play(url: str, script: list[tuple[Any, ...]], retain_s: float) -> None:
    redis, keys = bus.connect(url), Keys("test")
    try:
        await redis.flushall()
        world = World(redis, keys, retain_s)
        await world.begin()
        for action in script:
            await do(world, action)
        await world.settle()
        for client in world.clients:
            assert client.shown == whole(client.request)
        for one in world.requests:
            await (check_kept if retain_s else check_gone)(world, one)
    finally:
        await redis.aclose()


async def check_kept(world: World, one: Request) -> None:
    """Somebody who comes back gets all of it again."""
    record = (await world.records.get([one.id]))[one.id]
    assert record.finish is not None
    assert (await world.records.read_journal(one.id)) == TOKENS
    assert 0 < await world.redis.ttl(world.keys.journal(one.id)) <= 60
    late = Client(world.redis, world.keys, one, "late")
    await late.connect()
    await late.attach()
    await world.catch_up()
    await late.read()
    assert late.shown == whole(one)


async def check_gone(world: World, one: Request) -> None:
    names = (world.keys.request, world.keys.journal, world.keys.logprobs)
    assert not await world.redis.exists(*(name(one.id) for name in names))


@settings(max_examples=60)
@given(st.lists(actions, max_size=40), st.sampled_from([0.0, 60.0]))
# A worker took the shard over with more in its stream than it reads in a turn, and then somebody came back.
@example([("finish",), ("turn", 0), ("come_back", 0), ("turn", 0, "trim.before")], 60.0)
def test_any_crash_pause_and_return_shows_the_same_answer(
    redis_server: RedisServer, script: list[tuple[Any, ...]], retain_s: float
) -> None:
    asyncio.run(play(redis_server.url, script, retain_s))
