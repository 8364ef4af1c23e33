"""Mailbox: commands of the asyncio side to the model's thread."""

from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from services.engine.schedule.embeds import Embeds
from services.engine.schedule.sequence import Sequence
from shared.messages import Begin, Finish


@dataclass(frozen=True, slots=True)
class Add:
    """Run this sequence."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Supply:
    """Continue with embeddings that this request lacked, by index of their span, if it is there."""

    request_id: str
    arrived: Mapping[int, Embeds]


@dataclass(frozen=True, slots=True)
class Abort:
    """End this request with `finish`, if it is there: it was cancelled, or its deadline has passed."""

    request_id: str
    finish: Finish


@dataclass(frozen=True, slots=True)
class Forget:
    """Free what this request holds, without a message: it is another engine's now, or comes again under a new epoch."""

    request_id: str


@dataclass(frozen=True, slots=True)
class FinishUnstarted:
    """Send the finish of a request that never became a sequence. It takes the same path as all output, so order is
    kept."""

    shard: int
    begin: Begin
    finish: Finish


Command = Add | Supply | Abort | Forget | FinishUnstarted


class Mailbox:
    """Queue of commands from many threads to one."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Command | None] = SimpleQueue()

    def put(self, command: Command) -> None:
        self._queue.put(command)

    def close(self) -> None:
        """Let the reader end after the commands already sent."""
        self._queue.put(None)

    def receive(self, wait: bool) -> list[Command] | None:
        """Return all commands there are, in order; with `wait`, at least one. None: the mailbox was closed."""
        commands: list[Command] = []
        try:
            while True:
                command = self._queue.get(block=wait and not commands)
                if command is None:
                    return None
                commands.append(command)
        except Empty:
            return commands
