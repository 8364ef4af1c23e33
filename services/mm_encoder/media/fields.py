"""H.264 whose frames are coded as two fields each, in a packet for either or for both: which packets begin a frame.

Interlaced recordings of broadcasters and cameras may switch between fields and whole frames from picture to picture
(PAFF). The container counts packets, and the decoder joins two fields to a frame. Which a picture is stands in the
header of its first slice; the parameter sets say whether there can be fields, and where in that header it stands.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

_SLICE, _IDR_SLICE, _SPS, _PPS = 1, 5, 7, 8  # NAL units
_CHROMA_PROFILES = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)
_START = b"\0\0\1"
# What is looked at of a packet: as many NAL units, of each the beginning. Parameter sets are shorter, and a field has
# seldom more than 10 slices, or some 70 of a network packet's size.
_MOST_UNITS, _HEAD_BYTES, _SLICE_BYTES = 256, 512, 32
_MOST_SEQUENCES, _MOST_PICTURES = 32, 256  # ids of parameter sets
# How many different sequence parameter sets are parsed of a track; further ones are ignored. A programme has one.
_MOST_PARSED = 256
_MOST_OFFSETS = 255  # of the order count's cycle
_MOST_ZEROS = 32  # before a number


class _Sequence(NamedTuple):
    """Facts of a sequence parameter set."""

    may_have_fields: bool
    colour_plane_bits: int
    frame_number_bits: int


class _Picture(NamedTuple):
    frame_number: int
    bottom: bool | None  # None: a whole frame


class FieldPairs:
    """Recogniser of second fields; feed it every packet of the track, in order."""

    def __init__(self, extradata: bytes | None) -> None:
        extradata = extradata or b""
        self._length_bytes = _length_bytes(extradata)  # before each NAL unit; 0: start codes, as in MPEG-TS
        self._parsed: dict[bytes, tuple[int, _Sequence] | None] = {}  # by NAL unit; None: broken
        self._sequences: dict[int, _Sequence] = {}
        self._sequence_ids: dict[int, int] = {}  # by picture parameter set
        self._first: _Picture | None = None  # of a frame whose second field has not come
        self.follow(extradata)

    @property
    def possible(self) -> bool:
        """True if the parameter sets allow fields, or none are known yet."""
        return not self._sequences or any(sequence.may_have_fields for sequence in self._sequences.values())

    def follow(self, extradata: bytes) -> None:
        """Take in parameter sets that the container has beside its packets, from the next packet on.

        As FFmpeg does, it takes those before what is cut off, and lengths go on as they are unless all is whole.
        """
        length_bytes, at = _length_bytes(extradata), 5
        if not length_bytes:
            for unit in _after_start_codes(extradata):
                self._read(unit)
            return
        for mask in (0x1F, 0xFF):  # the number of sequence, then of picture parameter sets
            count = int.from_bytes(extradata[at : at + 1], "big") & mask
            at += 1
            for _ in range(count):
                size = int.from_bytes(extradata[at : at + 2], "big")
                at += 2
                if at + size > len(extradata):
                    return
                self._read(extradata[at : at + min(size, _HEAD_BYTES)])
                at += size
        self._length_bytes = length_bytes

    def begins_frame(self, packet: bytes) -> bool:
        """Return False if the packet holds only the second field of a frame; what is broken begins a frame.

        As FFmpeg does, it takes the first slice of a packet, or of a picture, for the beginning of a picture.
        """
        begun: list[bool] = []
        for unit in self._units(packet):
            if begun and not _begins_picture(unit):
                continue
            picture = self._read(unit)
            if picture is not None:
                begun.append(self._begins_frame(picture))
                if picture.bottom is None:  # alone in its packet
                    break
        return any(begun) or not begun

    def _begins_frame(self, picture: _Picture) -> bool:
        first, self._first = self._first, None
        if picture.bottom is None:
            return True
        if first == _Picture(picture.frame_number, not picture.bottom):
            return False
        self._first = picture
        return True

    def _units(self, data: bytes) -> Iterator[bytes]:
        """Yield the beginnings of the first NAL units."""
        if not self._length_bytes:
            yield from _after_start_codes(data)
            return
        at = 0
        for _ in range(_MOST_UNITS):
            size = int.from_bytes(data[at : at + self._length_bytes], "big")
            at += self._length_bytes
            if at >= len(data):
                return
            yield data[at : at + min(size, _HEAD_BYTES)]
            at += size

    def _read(self, unit: bytes) -> _Picture | None:
        """Take in a NAL unit; return the picture of a slice."""
        kind = unit[0] & 31 if unit else 0
        try:
            if kind == _SPS:
                self._read_sequence(unit)
            elif kind == _PPS:
                bits = _Bits(unit[1:_SLICE_BYTES])
                number = bits.below(_MOST_PICTURES)
                self._sequence_ids[number] = bits.below(_MOST_SEQUENCES)
            elif kind in (_SLICE, _IDR_SLICE):
                return self._read_slice(_Bits(unit[1:_SLICE_BYTES]))
        except (ValueError, KeyError):  # cut short, or of parameter sets that are not there
            return None
        return None

    def _read_sequence(self, unit: bytes) -> None:
        unit, _, _ = unit.partition(_START)  # what follows differs from picture to picture
        if unit not in self._parsed and len(self._parsed) < _MOST_PARSED:
            self._parsed[unit] = None
            self._parsed[unit] = _parse_sequence(_Bits(unit[1:]))
        known = self._parsed.get(unit)
        if known is not None:
            number, self._sequences[number] = known

    def _read_slice(self, bits: "_Bits") -> _Picture:
        bits.unsigned()  # its first macroblock
        bits.unsigned()  # type
        sequence = self._sequences[self._sequence_ids[bits.unsigned()]]
        bits.take(sequence.colour_plane_bits)
        frame_number = bits.take(sequence.frame_number_bits)
        is_field = sequence.may_have_fields and bits.take(1)
        return _Picture(frame_number, bool(bits.take(1)) if is_field else None)


def _length_bytes(extradata: bytes) -> int:
    """Return how long the lengths before NAL units are; 0 if the extradata is not as in MP4."""
    return (extradata[4] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) >= 7 else 0


def _parse_sequence(bits: "_Bits") -> tuple[int, _Sequence]:
    """Return a sequence parameter set's id and facts."""
    profile = bits.take(8)
    bits.take(16)
    number = bits.below(_MOST_SEQUENCES)
    planes = bits.skip_chroma() if profile in _CHROMA_PROFILES else 0
    frame_number_bits = bits.unsigned() + 4
    bits.skip_order_count()
    bits.unsigned()  # reference frames
    bits.take(1)  # gaps
    bits.unsigned()  # width
    bits.unsigned()  # height
    return number, _Sequence(not bits.take(1), planes, frame_number_bits)


def _after_start_codes(data: bytes) -> Iterator[bytes]:
    """Yield the beginnings of the first NAL units."""
    for at in islice(_starts(data), _MOST_UNITS):
        yield data[at : at + _HEAD_BYTES]


def _starts(data: bytes) -> Iterator[int]:
    """Yield where NAL units begin, behind their start codes."""
    at = data.find(_START)
    while at >= 0:
        yield at + len(_START)
        at = data.find(_START, at + len(_START))


def _begins_picture(unit: bytes) -> bool:
    """Return True for all but slices that are not the first of their picture, whose first macroblock is 0: a 1 bit."""
    is_slice = bool(unit) and unit[0] & 31 in (_SLICE, _IDR_SLICE)
    return not is_slice or unit[1:2] >= b"\x80"


class _Bits:
    """Reader of a NAL unit's payload. All methods raise ValueError at its end or for a number out of range."""

    def __init__(self, payload: bytes) -> None:
        payload = payload.replace(b"\0\0\3", b"\0\0")  # a byte that keeps the payload from looking like a start code
        self._value = int.from_bytes(payload, "big")
        self._left = 8 * len(payload)

    def take(self, count: int) -> int:
        if count > self._left:
            raise ValueError("the unit is cut short")
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def unsigned(self) -> int:
        zeros = self._left - (self._value & ((1 << self._left) - 1)).bit_length()
        if zeros > _MOST_ZEROS:
            raise ValueError("a number is too long")
        return self.take(2 * zeros + 1) - 1

    def below(self, limit: int) -> int:
        value = self.unsigned()
        if value >= limit:
            raise ValueError(f"{value} is not below {limit}")
        return value

    def signed(self) -> int:
        value = self.unsigned()
        return (value + 1) // 2 if value % 2 else -(value // 2)

    def skip_chroma(self) -> int:
        """Skip the chroma format, depths and scaling lists; return how many bits name a slice's colour plane."""
        chroma = self.unsigned()
        planes = 2 * self.take(1) if chroma == 3 else 0
        self.unsigned()
        self.unsigned()
        self.take(1)
        if self.take(1):
            for number in range(12 if chroma == 3 else 8):
                if self.take(1):
                    self._skip_scaling_list(16 if number < 6 else 64)
        return planes

    def _skip_scaling_list(self, size: int) -> None:
        last = following = 8
        for _ in range(size):
            if following:
                following = (last + self.signed()) % 256
            last = following or last

    def skip_order_count(self) -> None:
        kind = self.unsigned()
        if kind == 0:
            self.unsigned()
        elif kind == 1:
            self.take(1)
            for _ in range(2):
                self.signed()
            for _ in range(self.below(_MOST_OFFSETS + 1)):
                self.signed()
