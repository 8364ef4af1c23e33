"""Work on frames by several threads: all of it is done, a bounded part of it at once, and errors are told."""

import threading

import pytest

from services.mm_encoder.media.turns import Turns


@pytest.mark.parametrize("threads", [1, 3])
def test_all_work_is_done_at_the_end(threads: int) -> None:
    done: list[int] = []
    with Turns(threads).all_done() as in_turn:
        for number in range(20):
            in_turn(lambda number=number: done.append(number))  # type: ignore[misc]
    assert sorted(done) == list(range(20))


def test_no_more_is_under_way_than_there_are_threads() -> None:
    lock, now, most = threading.Lock(), 0, 0
    together = threading.Barrier(2)

    def work() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait()  # passes only where two are at work
        with lock:
            now -= 1

    with Turns(2).all_done() as in_turn:
        for _ in range(10):
            in_turn(work)
    assert most == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_thread_is_raised(threads: int) -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError), Turns(threads).all_done() as in_turn:
        in_turn(fail)


def test_all_work_has_ended_when_a_frame_is_broken() -> None:
    go_on, done = threading.Event(), threading.Event()

    def work() -> None:
        go_on.wait()
        done.set()

    def decode() -> None:
        with Turns(2).all_done() as in_turn:
            in_turn(work)
            go_on.set()
            raise ValueError("a frame is broken")

    with pytest.raises(ValueError, match="a frame is broken"):
        decode()
    assert done.is_set()
