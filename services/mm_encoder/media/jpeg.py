"""Number of scans in a JPEG, by its markers.

Every scan of a progressive or non-interleaved JPEG goes through the whole picture, and a scan of a few dozen bytes may
follow another thousands of times: 484 KB can take minutes.
"""

import re

from services.mm_encoder.media.refusal import refuse

MAX_SCANS = 100  # encoders write 10 to 20

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# In a scan's data FF is followed by 00 where it is no marker, by D0 to D7 where the decoder may start again, or by FF.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def count_scans(data: bytes) -> int:
    """Return the number of scans up to the end of the image.

    Raises:
        RequestError: there are more than `MAX_SCANS`.
    """
    scans, place = 0, _next_marker(data, 2)
    while place >= 0 and data[place] != _END_OF_IMAGE:
        scans += data[place] == _START_OF_SCAN
        if scans > MAX_SCANS:
            raise refuse(f"The JPEG has more than {MAX_SCANS} scans.")
        length = int.from_bytes(data[place + 1 : place + 3], "big")
        place = _next_marker(data, place + 1 + length)
    return scans


def _next_marker(data: bytes, start: int) -> int:
    """Return the place of the next marker's code, -1 if there is none."""
    found = _MARKER.search(data, start)
    return -1 if found is None else found.start() + 1
