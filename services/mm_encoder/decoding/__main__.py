"""Decoder process: `python -m services.mm_encoder.decoding FD`, started by the mm_encoder with its end of a socket."""

import signal
import socket
import sys

from services.mm_encoder.decoding.worker import Worker


def main() -> None:
    """Decode until the encoder closes its end. An interrupt from a terminal is for the encoder, which drains first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as link:
        Worker(link).run()


if __name__ == "__main__":
    main()
