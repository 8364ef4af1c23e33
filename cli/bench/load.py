"""Loads of `millrace bench serve`, and what its client processes saw: values that travel as JSON between them.

All times are seconds of the machine's monotonic clock, which its processes share.
"""

import random
from collections.abc import Sequence

import msgspec

Range = tuple[int, int]  # both ends included


class Arrival(msgspec.Struct, frozen=True):
    """Request that is sent at a time, whatever became of those before."""

    at: float  # seconds from the beginning
    prompt: int  # tokens


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one client process: a closed loop of `clients`, or the `arrivals` at their times."""

    url: str  # of /v1/completions, or of /v1/chat/completions with a picture
    model: str
    key: str
    prompt: Range  # tokens
    output: int  # tokens
    ids: Range  # prompts are drawn from these
    clients: int = 0
    requests: int | None = None  # in a closed loop; None: until `seconds` have passed
    seconds: float | None = None  # what is open then is given up
    arrivals: tuple[Arrival, ...] = ()
    picture: tuple[int, int] | None = None  # width and height of one that each request asks about, with few words
    seen: bool = False  # it is always the same picture


class Answer(msgspec.Struct):
    """Stream of one request, as it came in. Without `ended` and `error` it was open when the time was up."""

    prompt: int
    sent: float
    events: list[float] = []  # when each event with text was read
    tokens: int | None = None  # of the answer, as the server counts them
    ended: float | None = None
    error: str | None = None


class Part(msgspec.Struct, frozen=True):
    """Result of one client process."""

    answers: list[Answer]
    cpu: float  # of a core that the process was busy, on average


def poisson(rate: float, seconds: float, prompt: Range, seed: int) -> list[Arrival]:
    """Draw arrivals at `rate` a second with prompts of even length within `prompt`; the same for the same seed."""
    rng, now, arrivals = random.Random(seed), 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        arrivals.append(Arrival(now, rng.randint(*prompt)))
    return arrivals


def shares(load: Load, processes: int) -> list[Load]:
    """Divide a load among as many processes as it has clients for, at most `processes`."""
    if load.arrivals:
        dealt = [load.arrivals[i::processes] for i in range(processes)]
        return [msgspec.structs.replace(load, arrivals=part) for part in dealt if part]
    count = min(processes, load.clients)
    clients = even(load.clients, count)
    requests: Sequence[int | None] = [None] * count if load.requests is None else even(load.requests, count)
    return [
        msgspec.structs.replace(load, clients=own, requests=some) for own, some in zip(clients, requests, strict=True)
    ]


def even(total: int, parts: int) -> list[int]:
    """Divide a number into whole parts that differ by one at most."""
    return [total // parts + (i < total % parts) for i in range(parts)]
