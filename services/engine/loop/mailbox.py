"""What the asyncio side tells the model's thread."""

from dataclasses import dataclass
from queue import Empty, SimpleQueue

from services.engine.schedule.sequence import Sequence
from shared.messages import Begin, Finish


@dataclass(frozen=True, slots=True)
class Add:
    """Run this sequence."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Abort:
    """End this request, and say so, if it is there: nobody waits for it any more, or its time is over."""

    request_id: str
    finish: Finish


@dataclass(frozen=True, slots=True)
class Forget:
    """Free what this request holds, and say nothing of it: it is another's now, or comes again under a new epoch."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Say of a request that never became a sequence how it ended. Takes the way of all answers, so order is kept."""

    shard: int
    begin: Begin
    finish: Finish


Command = Add | Abort | Forget | Answer


class Mailbox:
    """From many to one thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Command | None] = SimpleQueue()

    def put(self, command: Command) -> None:
        self._queue.put(command)

    def close(self) -> None:
        """Let the reader end after what it has."""
        self._queue.put(None)

    def receive(self, wait: bool) -> list[Command] | None:
        """All commands there are, in order; with `wait`, at least one. None: the mailbox was closed."""
        commands: list[Command] = []
        try:
            while True:
                command = self._queue.get(block=wait and not commands)
                if command is None:
                    return None
                commands.append(command)
        except Empty:
            return commands
