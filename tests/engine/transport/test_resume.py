"""What a request has generated so far: journal and stream put together by postproc's rules."""

from engine_cases import generate
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from services.engine.transport.resume import PAGE, History, fold, recover
from shared.bus.keys import GENERATE, Keys
from shared.bus.records import Records
from shared.bus.streams import send
from shared.messages import Begin, Finish, TokenRun, Tokens


def run(epoch: int, index: int, *tokens: int, finish: Finish | None = None) -> TokenRun:
    return TokenRun("r", epoch, index, tokens, None, finish)


def begin(epoch: int, index: int) -> Begin:
    return Begin("r", epoch, index, 3, 0, 0, 0)


WHOLE = list(range(100, 120))


@given(
    journaled=st.integers(0, 20),
    overlap=st.integers(0, 20),
    cuts=st.lists(st.integers(1, 4), min_size=20, max_size=20),
    end=st.integers(0, 20),
)
def test_journal_and_tail_join_wherever_they_are_cut(journaled: int, overlap: int, cuts: list[int], end: int) -> None:
    said, at = [], max(0, journaled - overlap)
    for length in cuts:
        said.append(run(1, at, *WHOLE[at : min(at + length, end)]))
        at = max(at, min(at + length, end))
    assert fold(WHOLE[:journaled], said) == History(tuple(WHOLE[: max(journaled, at)]))


def test_an_older_epoch_is_not_heard_once_a_newer_has_spoken() -> None:
    assert fold([1], [begin(2, 1), run(1, 1, 7), run(2, 1, 5)]).tokens == (1, 5)
    assert fold([1], [run(1, 1, 7), begin(2, 2), run(1, 2, 8), run(2, 2, 5)]).tokens == (1, 7, 5)
    assert fold([1], [run(1, 1, 7), run(2, 1, 5)], epoch=2).tokens == (1, 5)


def test_tokens_behind_a_gap_do_not_count() -> None:
    assert fold([1], [run(1, 3, 7), run(1, 1, 5)]).tokens == (1, 5)


def test_a_finish_ends_it_unless_it_is_out_of_date() -> None:
    done = run(1, 1, 7, finish=Finish("length"))
    assert fold([1], [done]) == History((1, 7), ended=True)
    assert fold([1, 7], [done]).ended
    assert not fold([1], [begin(2, 1), done]).ended


async def test_the_tail_is_read_to_its_end_past_what_others_say(redis: Redis, keys: Keys) -> None:
    records, message = Records(redis, keys), generate("r", [5], 9, shard=1)
    await records.submit(GENERATE, message)
    await redis.hincrby(keys.request("r"), "epoch", 1)
    await records.write_journal([("r", 0, [1, 2])])
    for index in range(PAGE + 1):
        await send(redis, keys.tokens(1), Tokens((), (TokenRun("other", 1, index, (9,)),)))
    await redis.xadd(keys.tokens(1), {b"v": b"0", b"m": b"from another version"})
    await send(redis, keys.tokens(1), Tokens((begin(1, 0),), (run(1, 0, 1), run(1, 1, 2, 3))))
    claims = {"r": (message, 2)}
    assert await recover(redis, keys, records, claims) == {"r": History((1, 2, 3))}
    await records.delete(["r"])
    assert (await recover(redis, keys, records, claims))["r"].ended, "it ended while nobody looked"


async def test_nothing_to_recover_reads_nothing(redis: Redis, keys: Keys) -> None:
    assert await recover(redis, keys, Records(redis, keys), {}) == {}
