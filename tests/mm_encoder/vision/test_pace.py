"""Pieces of passes on a GPU that an engine shares: a device and an engine of a page, with a clock of their own."""

import itertools

import pytest
from msgspec.structs import replace

from benchmarks.engine import CONFIG
from services.mm_encoder.vision.pace import (
    PATIENCE_S,
    POLL_S,
    PREFILL_PIECES,
    SLOWEST,
    WHOLE,
    Mark,
    Pace,
    SharedPace,
    pass_operations,
    pass_pace,
)
from services.mm_encoder.vision.tables import host_tables
from shared.card_page import PREFILL, SIZE, STALE_NS, CardPage

RATE = 4e14  # operations a second of the device
PIECE_S = 0.002
PIECE = RATE * PIECE_S
WORK = 1.001 * PIECE  # enough for a piece, whatever sums are rounded to


class Device:
    """A device that does what was sent in the order of sending; `now` is its and everybody's clock, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.busy_until = self.now
        self.longest_queue = 0.0

    def send(self, operations: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + operations / RATE
        self.longest_queue = max(self.longest_queue, self.busy_until - self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class At(Mark):
    def __init__(self, device: Device) -> None:
        self._device = device
        self.at = device.busy_until

    def wait(self) -> None:
        self._device.now = max(self._device.now, self.at)

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, At)
        return self.at - earlier.at


class Host:
    """A device, the page of an engine on it unless there is none, and the pace of an encoder."""

    def __init__(self, engines: int = 1, decode_pieces: int = 0) -> None:
        self.device = Device()
        self.pages = [CardPage(bytearray(SIZE), lambda: round(self.device.now * 1e9)) for _ in range(engines)]
        self.waits: list[float] = []
        self.pace = SharedPace(
            lambda: self.pages,
            PIECE_S,
            decode_pieces,
            self.waits.append,
            lambda: At(self.device),
            lambda: self.device.now,
            self.sleep,
        )
        self.step_ends: float | None = None
        self.begin()

    def begin(self) -> None:
        """Begin a batch of one pass."""
        self.pace.begin()
        self.pace.begin_pass()

    def learn(self) -> None:
        """Show the pace how fast the device is."""
        for _ in range(4):
            self.send(PIECE)
        At(self.device).wait()
        self.begin()
        self.learnt = self.device.now
        self.waits.clear()
        self.device.longest_queue = 0.0

    def send(self, operations: float) -> None:
        self.device.send(operations)
        self.pace.spend(operations)

    def sleep(self, seconds: float) -> None:
        self.device.sleep(seconds)
        if self.step_ends is not None and self.device.now >= self.step_ends:
            self.step_ends = None
            self.pages[0].end_step()

    def step(self, seconds: float, prefill: bool = True) -> None:
        """Begin a step that sequences wait for."""
        self.pages[0].begin_step(prefill)
        self.step_ends = self.device.now + seconds


def cut(operations: float, launch: float) -> list[float]:
    """Cut a pass into what is launched at a time."""
    whole, rest = divmod(operations, launch)
    return [launch] * int(whole) + [rest]


def test_without_an_engine_all_is_sent_at_once() -> None:
    for pace in (Pace(), Host(engines=0).pace):
        assert pace.cut([PIECE] * 9) == [slice(0, 9)]
        pace.spend(1000 * PIECE)
    host = Host(engines=0)
    host.send(1000 * PIECE)
    assert (host.device.now, host.waits) == (1000.0, [])


def test_no_more_is_sent_ahead_than_one_piece() -> None:
    host = Host()
    host.learn()
    for _ in range(200):
        host.send(PIECE * 0.26)
    assert host.waits == [0.0] * 50, "the engine needs nothing"
    assert host.device.longest_queue == pytest.approx(2 * 1.04 * PIECE_S)
    assert host.device.busy_until - host.learnt == pytest.approx(52 * PIECE_S), "the device never had nothing to do"


def test_the_size_of_a_piece_is_what_the_device_does_in_its_time() -> None:
    host = Host()
    assert host.pace.cut([SLOWEST * PIECE_S] * 2) == [slice(0, 1), slice(1, 2)]
    host.learn()
    assert host.pace.cut([PIECE * 0.3] * 7) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert host.pace.cut([PIECE * 3, PIECE * 2, PIECE / 2]) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_during_a_step_with_prefill_few_pieces_are_sent() -> None:
    host = Host()
    host.learn()
    host.step(0.02)
    before = host.device.now
    for _ in range(PREFILL_PIECES):
        host.send(WORK)
    assert host.device.now - before == pytest.approx(0.02, abs=2 * POLL_S), "it has waited for the step's end"
    assert [wait > 0 for wait in host.waits] == [False] * (PREFILL_PIECES - 1) + [True]
    host.send(WORK)
    assert host.waits[-1] == 0.0


def test_of_decode_steps_each_has_as_many_pieces_as_it_should() -> None:
    for pieces in (1, 2):
        host = Host(decode_pieces=pieces)
        host.learn()
        steps = 0
        for _ in range(60):
            if host.step_ends is None:
                host.step(0.02, prefill=False)
                steps += 1
            host.send(WORK)
        assert steps == pytest.approx(60 / pieces, abs=1)
        assert host.device.longest_queue == pytest.approx(PIECE_S, rel=0.01), "none is sent ahead"
    host = Host()
    host.learn()
    host.step(0.1, prefill=False)
    for _ in range(60):
        host.send(WORK)
    assert sum(host.waits) == 0, "as many as there are"


@pytest.mark.parametrize("picture_s", [0.0005, 0.0013, 0.0019, 0.004, 0.007, 0.012])
def test_batch_after_batch_of_small_pictures_leaves_steps_their_time(picture_s: float) -> None:
    """Each batch is one pass, at most some pieces long; an engine computes steps, every third with prefill.

    What a step with prefill shares the device with is what was under way when it began, and what is sent during it: as
    planned (BESIDE_ENCODER), three pieces at most.
    """
    host = Host()
    host.learn()
    launch, batches, beside = 0.26 * PIECE, 0, [0.0]
    steps = itertools.cycle([(0.004, False), (0.004, False), (0.016, True)])

    def go_on() -> None:
        if host.step_ends is None:
            seconds, prefill = next(steps)
            host.step(seconds, prefill)
            beside.append(max(0.0, host.device.busy_until - host.device.now) if prefill else 0.0)

    end = host.device.now + 2.0
    while host.device.now < end:
        host.begin()
        go_on()
        operations = picture_s * RATE
        for part in cut(operations, launch):
            go_on()
            if host.pages[0].step() & PREFILL:
                beside[-1] += part / RATE
            host.send(part)
        At(host.device).wait()
        host.sleep(0.0005)
        batches += 1
    assert PIECE_S < max(beside) <= (PREFILL_PIECES + 1) * PIECE_S
    assert batches > 20


def test_a_long_piece_counts_as_what_it_takes() -> None:
    """Attention of a large frame is not parted further than by tiles, and a slow card takes long for a graph."""
    host = Host()
    host.learn()
    host.step(0.02)
    host.send(PREFILL_PIECES * WORK)
    assert host.waits[-1] == pytest.approx(0.02, abs=2 * POLL_S)


def test_what_was_sent_during_a_step_is_remembered_from_batch_to_batch() -> None:
    """Also what is less than a piece."""
    host = Host()
    host.learn()
    host.step(0.02)
    for _ in range(2 * PREFILL_PIECES):
        assert sum(host.waits) == 0.0
        host.begin()
        host.send(WORK / 2)
    assert host.waits[-1] > 0.0
    assert host.step_ends is None
    host.step(0.02)
    host.begin()
    host.send(WORK)
    assert host.waits[-1] == 0.0, "this is another step"


def test_what_is_sent_where_no_engine_is_counts_for_none() -> None:
    host = Host()
    host.learn()
    (page,) = host.pages
    host.pages = []
    host.begin()
    host.send(1000 * PIECE)
    host.pages = [page]
    host.begin()
    host.step(0.02)
    host.send(PIECE / 2)
    assert host.waits == []


def test_step_after_step_the_tower_gets_on() -> None:
    """Every step has prefill, and is followed by the next at once."""
    host = Host()
    host.learn()
    sent, began = 0, host.device.now
    while host.device.now < began + 1.0:
        if host.step_ends is None:
            host.step(0.02)
        host.send(WORK)
        sent += 1
    assert sent >= 49 * PREFILL_PIECES


def test_an_engine_that_dies_in_a_step_holds_nothing_up_for_long() -> None:
    host = Host()
    host.learn()
    host.pages[0].begin_step(True)
    before = host.device.now
    for _ in range(50):
        host.send(WORK)
    assert host.device.now - before == pytest.approx(STALE_NS / 1e9 + 50 * PIECE_S, rel=0.1)


def test_a_pass_waits_for_so_long_and_the_next_one_again() -> None:
    """A video has many."""
    host = Host()
    host.learn()
    for _ in range(9):
        host.pace.begin_pass()
        host.waits.clear()
        for _ in range(200):
            host.step(0.09)
            for _ in range(PREFILL_PIECES):
                host.send(WORK)
        assert sum(host.waits) == pytest.approx(PATIENCE_S, abs=2 * POLL_S)


def test_a_halt_of_the_process_is_no_wait() -> None:
    host = Host()
    host.learn()
    host.step(0.09)
    host.device.sleep = lambda seconds: Device.sleep(host.device, 1000.0)  # type: ignore[method-assign]
    for _ in range(PREFILL_PIECES):
        host.send(WORK)
    assert sum(host.waits) <= PATIENCE_S


def test_of_several_engines_each_is_heard() -> None:
    host = Host(engines=3)
    host.learn()
    host.step(0.02)
    for _ in range(PREFILL_PIECES):
        host.send(WORK)
    assert host.waits[-1] > 0.01


def test_an_engine_hears_that_the_encoder_works() -> None:
    host = Host()
    assert not host.pages[0].encoder_works()
    host.learn()
    assert host.pages[0].encoder_works()


def test_parts_of_a_pass_cost_what_the_pass_does() -> None:
    """By hand: a layer's products of a row, and attention of a row to each of its frame, which takes longer."""
    vision = replace(CONFIG.vision, depth=3)
    host = host_tables([(1, 32, 32), (1, 64, 64)], vision)
    width, inner, rows = 1280, 5120, 1024 + 4096
    products = rows * 2 * (3 * width * width + width * width + 2 * width * inner)
    attention = (1024**2 + 4096**2) * 2 * 2 * width * 1.7
    assert pass_operations(host, vision) == pytest.approx(3 * (products + attention))
    whole = pass_pace(Pace(), host, vision)
    assert [tiles for tiles, _ in whole.attention] == [slice(0, 8 + 32)]
    assert whole.attention[0][1] == pytest.approx(attention)
    shared = Host()
    shared.learn()
    shared.pace._piece_s /= 80
    cut = pass_pace(shared.pace, host, vision)
    assert len(cut.attention) > 4
    starts = [host.tiles[tiles].data_ptr() for tiles, _ in cut.attention]
    assert {(start - starts[0]) % 16 for start in starts} == {0}, "a kernel is compiled for each alignment"
    assert sum(cost for _, cost in cut.attention) == pytest.approx(attention)
    assert [place for tiles, _ in cut.attention for place in range(40)[tiles]] == list(range(40))
    assert len(host.tiles[WHOLE.attention[0][0]]) == 40
