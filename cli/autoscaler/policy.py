"""Scaling policy: the number of replicas as a function of a stage's load, its recent loads, and the time.

Work is waiting and running requests together, so the number does not depend on how many replicas there are now, and
does not run away while they start. More are asked for at once, fewer when no load within the cool-down needed more.
Work that came and went between two looks is known by the number of entries that its stream has had: a stage that is
always idle when it is looked at, and used in between, keeps a replica.
"""

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

# stay; ask for more; mark the replicas that are to go first; ask for fewer
Step = Literal["stay", "out", "mark", "in"]


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scaling rules of one stage. With `least` 0 it sleeps while there is no work."""

    deployment: str  # the Deployment to scale
    target: Annotated[int, Meta(ge=1)]  # requests, waiting and running, that one replica should have
    least: Annotated[int, Meta(ge=0)] = 1  # replicas at least; 0: the stage sleeps while it has no work
    most: Annotated[int, Meta(ge=1)]  # replicas at most
    cooldown_s: Annotated[float, Meta(ge=0)] = 300.0  # how long the work must ask for fewer before there are fewer


class Seen(msgspec.Struct, frozen=True):
    """State of a stage at one moment. `work`: its requests, waiting and running, without those of draining replicas,
    which finish their own. `coming`: requests that an earlier stage will hand to it. `replicas`: how many Kubernetes
    was asked for. `added`: entries that its stream has had in all."""

    work: int
    replicas: int
    coming: int = 0
    added: int = 0


class Memory(msgspec.Struct, frozen=True):
    """Past that a decision needs: since when the stage is watched, what its work asked for within the cool-down, and
    how many entries its stream had had at the last look."""

    since: float
    wanted: tuple[tuple[float, int], ...] = ()  # (when, replicas)
    marked: bool = False  # the replicas that are to go have been marked
    added: int | None = None  # None: this is the first look


class Decision(msgspec.Struct, frozen=True):
    step: Step
    replicas: int  # that there should be; with "mark", soon
    why: str


def wanted(rules: Rules, seen: Seen, arrived: int = 0) -> int:
    """Return the number of replicas that the work of this moment asks for, and what has `arrived` since the last."""
    enough = math.ceil(seen.work / rules.target)
    # Starting a replica takes longer than the stage before takes with a request.
    awake = 1 if seen.coming or arrived else 0
    return min(rules.most, max(rules.least, enough, awake))


def decide(rules: Rules, seen: Seen, memory: Memory, now: float) -> tuple[Memory, Decision]:
    """Decide for one observation. Time is in seconds, on a clock that does not jump.

    A decrease takes two observations in a row: the first marks the replicas that are to go, since Kubernetes may act on
    a new number before it has read a mark that was written just before.
    """
    arrived = _arrived(seen, memory)
    asked = wanted(rules, seen, arrived)
    work = _work(seen, arrived)
    recent = (*((when, number) for when, number in memory.wanted if when > now - rules.cooldown_s), (now, asked))
    calm = max(number for _, number in recent)
    if asked > seen.replicas:
        return _remember(memory, recent, seen), Decision("out", asked, f"{work}, {rules.target} a replica")
    if calm < seen.replicas and now - memory.since >= rules.cooldown_s:
        step: Step = "in" if memory.marked else "mark"
        why = f"{work}, and for {rules.cooldown_s:g} s never enough for more than {calm}"
        return _remember(memory, recent, seen, marked=step == "mark"), Decision(step, calm, why)
    return _remember(memory, recent, seen), Decision("stay", seen.replicas, f"{work}, enough for {asked}")


def _arrived(seen: Seen, memory: Memory) -> int:
    """Return how many entries came since the last look. A stream that was made anew counts from zero."""
    if memory.added is None:
        return 0
    return seen.added - memory.added if seen.added >= memory.added else seen.added


def _remember(memory: Memory, recent: tuple[tuple[float, int], ...], seen: Seen, marked: bool = False) -> Memory:
    return Memory(memory.since, recent, marked, seen.added)


def _work(seen: Seen, arrived: int) -> str:
    gone = f", {arrived} more since the last look" if arrived > seen.work else ""
    return f"{seen.work} in work or waiting" + (f", {seen.coming} coming" if seen.coming else "") + gone
