"""Decoder process: `python -m services.mm_encoder.decoding FD`, started by the mm_encoder with its end of a socket."""

import sys

from services.mm_encoder.decoding.worker import run
from shared.workers.link import Link

if __name__ == "__main__":
    run(Link(int(sys.argv[1])))
