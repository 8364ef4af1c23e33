"""Signals that ask a command to end: Ctrl-C, `kill`, and a terminal that closes.

Not where whoever started us has them ignored: `nohup` the terminal that closes, a shell's script the Ctrl-C for what it
runs by `&`.
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

Handler = Callable[[int, FrameType | None], object] | signal.Handlers

_received: list[int] = []


def kept_by_nohup() -> bool:
    """Return True if we are to go on when the terminal closes."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def handle(handler: Handler) -> None:
    """Have all of them handled so that are not ignored."""
    signal.signal(signal.SIGTERM, handler)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_once() -> None:
    """Let them end a process that has nothing to clean up, while it imports what it needs.

    A KeyboardInterrupt between imports is often lost, in callbacks of the import system that print it and go on, and
    has crashed extensions.
    """
    handle(signal.SIG_DFL)


def end_by_exception() -> None:
    """Let them raise a KeyboardInterrupt, so that what was begun is cleaned up."""
    handle(signal.default_int_handler)  # which asyncio replaces by one that cancels the command's task


def end_by_exception_or_later() -> None:
    """Let them raise a KeyboardInterrupt and be kept for `hand_over`: it is printed and lost where a finaliser runs."""
    handle(_interrupt)


def hand_over(handler: Callable[[int, FrameType | None], object]) -> None:
    """Have them handled so from now on, and those that were kept: who is still here has lost their exception.

    Ctrl-C is so even where it was ignored: a script that ends by it leaves no servers.
    """
    handle(handler)
    signal.signal(signal.SIGINT, handler)
    while _received:
        handler(_received.pop(0), None)


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt
