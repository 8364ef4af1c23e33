"""Pictures of H.264 that are coded by fields or whole, and their parameter sets."""

WIDTH, HEIGHT = 2, 2  # macroblocks of a field


class Bits:
    """A NAL unit's payload, from its beginning."""

    def __init__(self) -> None:
        self.text = ""

    def fixed(self, width: int, *values: int) -> "Bits":
        self.text += "".join(format(value, f"0{width}b") for value in values)
        return self

    def golomb(self, *values: int) -> "Bits":
        for value in values:
            digits = format(value + 1, "b")
            self.text += "0" * (len(digits) - 1) + digits
        return self

    def stored(self, grey: int) -> "Bits":
        """Add a macroblock of one grey, as its samples."""
        self.golomb(25)
        self.text += "0" * (-len(self.text) % 8)
        return self.fixed(8, *[grey] * 256, *[128] * 128)

    def unit(self, header: int) -> bytes:
        text = self.text + "1"
        text += "0" * (-len(text) % 8)
        payload = bytearray()
        for byte in int(text, 2).to_bytes(len(text) // 8, "big"):
            if byte <= 3 and payload[-2:] == b"\0\0":
                payload.append(3)
            payload.append(byte)
        return b"\0\0\0\1" + bytes([header]) + payload


def parameter_sets(*, fields: bool = True) -> bytes:
    """Return those of fields and whole frames, or of whole frames only."""
    sequence = Bits().fixed(8, 77, 0, 30).golomb(1, 0, 0, 4, 1).fixed(1, 0)
    if fields:
        sequence.golomb(WIDTH - 1, HEIGHT - 1).fixed(1, 0, 0)
    else:
        sequence.golomb(WIDTH - 1, 2 * HEIGHT - 1).fixed(1, 1)
    sequence.fixed(1, 1, 0, 0)
    picture = (
        Bits().golomb(2, 1).fixed(1, 0, 0).golomb(0, 0, 0).fixed(1, 0).fixed(2, 0).golomb(0, 0, 0).fixed(1, 0, 0, 0)
    )
    return sequence.unit(0x67) + picture.unit(0x68)


def picture(number: int, field: int | None, *, kept: bool = True, slices: int = 1, only: bool = False) -> bytes:
    """Return frame `number`, or its field 0 or 1, of intra macroblocks.

    One that is not `kept` as a reference has the number after the first frame's in its header. `only`: of a sequence of
    whole frames.
    """
    count = WIDTH * HEIGHT * (2 if field is None else 1) // slices
    return b"".join(_slice(number, field, kept, only, range(at, at + count)) for at in range(0, count * slices, count))


def _slice(number: int, field: int | None, kept: bool, only: bool, macroblocks: range) -> bytes:
    first = number == 0 and field != 1
    bits = Bits().golomb(macroblocks.start, 7, 2).fixed(4, number % 16 if kept else 1)
    if not only:
        bits.fixed(1, *([0] if field is None else [1, field]))
    if first:
        bits.golomb(0)
    bits.fixed(8, (2 * number + (field or 0)) % 256)
    if kept:
        bits.fixed(1, *([0, 0] if first else [0]))
    bits.golomb(0)
    for _ in macroblocks:
        bits.stored(10 + number)
    return bits.unit(0x65 if first else 0x61 if kept else 0x01)
