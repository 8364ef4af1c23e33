"""What is read of H.264's parameter sets is bounded, whatever a file says."""

import pytest
from h264_fields import Bits, parameter_sets

from services.mm_encoder.media import fields
from services.mm_encoder.media.fields import FieldPairs


class CountedBits(fields._Bits):
    """Reader that counts what it reads of all units."""

    taken = 0

    def take(self, count: int) -> int:
        CountedBits.taken += 1
        return super().take(count)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[CountedBits]:
    monkeypatch.setattr(CountedBits, "taken", 0)
    monkeypatch.setattr(fields, "_Bits", CountedBits)
    return CountedBits


def endless_set(number: int, cycle: int, size: int = 65_000) -> bytes:
    """Return a sequence parameter set with as many offsets in its order count's cycle, and a number in it."""
    bits = Bits().fixed(8, 66, 0, 30).golomb(0, 0, 1).fixed(1, 1).golomb(0, 0, cycle, number)
    return bits.unit(0x67)[4:].ljust(size, b"\xff")


def mp4_header(*sets: bytes) -> bytes:
    pieces = b"".join(len(each).to_bytes(2, "big") + each for each in sets)
    return b"\1\x42\0\x1e\xff" + bytes([0xE0 | len(sets)]) + pieces + b"\0"


@pytest.mark.parametrize("cycle", [255, 256, 500_000])
def test_what_is_read_of_a_set_is_bounded(counted: type[CountedBits], cycle: int) -> None:
    FieldPairs(mp4_header(endless_set(0, cycle)))
    assert 5 < counted.taken < 300


def test_a_number_of_many_zeros_is_broken(counted: type[CountedBits]) -> None:
    FieldPairs(b"\0\0\1\x67\x42\1\x1e" + bytes([0x80] * 3) + b"\1" * 500)
    taken = counted.taken
    FieldPairs(b"\0\0\1\x67\x42\1\x1e" + b"\0\3" * 250)
    assert 0 < counted.taken - taken < 5


def test_sets_are_parsed_once_and_not_without_end(counted: type[CountedBits]) -> None:
    """In packets and beside them; those known before the last that is parsed go on being followed."""
    both, only = parameter_sets(), parameter_sets(fields=False)
    pairs = FieldPairs(only)
    pairs.begins_frame(both)
    taken = counted.taken
    for number in range(1000):
        following = b"\0\0\1\x06" + number.to_bytes(2, "big")
        pairs.begins_frame(both + following)
        assert pairs.possible
        pairs.begins_frame(only + following)
        assert not pairs.possible
    assert counted.taken - taken == 2000 * 2, "the picture parameter sets' ids"
    for number in range(1000):
        pairs.begins_frame(b"\0\0\0\1" + endless_set(number, 255, 400))
    taken, before = counted.taken, taken
    assert 254 * 255 < taken - before < 300 * 255
    pairs.begins_frame(both)
    assert pairs.possible
    beside = FieldPairs(mp4_header(endless_set(0, 255)))
    for number in range(1000):
        beside.follow(mp4_header(endless_set(number, 255)))
    assert 254 * 255 < counted.taken - taken < 300 * 257
