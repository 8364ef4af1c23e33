"""Terminal of a command: whether it was closed under us."""

import contextlib
import os
import select


class Terminal:
    """Controlling terminal, if there is one, and whether we are in its foreground.

    That it was closed the kernel tells its session's leader alone, and that may be a `make` or a `sudo` which passes
    nothing on and waits for us, as the command of an SSH session is. Who is in the background (`& disown`) is to go on.
    """

    def __init__(self) -> None:
        self._foreground = False
        self._poll = select.poll()
        try:
            self._descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        except OSError:
            self._descriptor = -1
        else:
            self._poll.register(self._descriptor, 0)  # of what it always tells: that it was hung up
            self.was_closed()

    def was_closed(self) -> bool:
        """Return True if it was closed, and we were in its foreground when this was called before."""
        if self._descriptor < 0:
            return False
        if any(event & select.POLLHUP for _, event in self._poll.poll(0)):  # macOS has no poll of terminals: POLLNVAL
            return self._foreground
        with contextlib.suppress(OSError):  # it is being closed
            self._foreground = os.tcgetpgrp(self._descriptor) == os.getpgrp()
        return False

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
