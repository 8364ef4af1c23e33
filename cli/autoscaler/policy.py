"""Scaling policy: the number of replicas as a function of a stage's load, its recent loads, and the time.

Work is waiting and running requests together, so the number does not depend on how many replicas there are now, and
does not run away while they start. More are asked for at once, fewer when no load within the cool-down needed more.
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
    was asked for."""

    work: int
    replicas: int
    coming: int = 0


class Memory(msgspec.Struct, frozen=True):
    """Past that a decision needs: since when the stage is watched, and what its work asked for within the cool-down."""

    since: float
    wanted: tuple[tuple[float, int], ...] = ()  # (when, replicas)
    marked: bool = False  # the replicas that are to go have been marked


class Decision(msgspec.Struct, frozen=True):
    step: Step
    replicas: int  # that there should be; with "mark", soon
    why: str


def wanted(rules: Rules, seen: Seen) -> int:
    """Return the number of replicas that the work of this moment asks for."""
    enough = math.ceil(seen.work / rules.target)
    # Starting a replica takes longer than the stage before takes with a request.
    awake = 1 if seen.coming else 0
    return min(rules.most, max(rules.least, enough, awake))


def decide(rules: Rules, seen: Seen, memory: Memory, now: float) -> tuple[Memory, Decision]:
    """Decide for one observation. Time is in seconds, on a clock that does not jump.

    A decrease takes two observations in a row: the first marks the replicas that are to go, since Kubernetes may act on
    a new number before it has read a mark that was written just before.
    """
    asked = wanted(rules, seen)
    recent = (*((when, number) for when, number in memory.wanted if when > now - rules.cooldown_s), (now, asked))
    calm = max(number for _, number in recent)
    if asked > seen.replicas:
        return Memory(memory.since, recent), Decision("out", asked, f"{_work(seen)}, {rules.target} a replica")
    if calm < seen.replicas and now - memory.since >= rules.cooldown_s:
        step: Step = "in" if memory.marked else "mark"
        why = f"{_work(seen)}, and for {rules.cooldown_s:g} s never enough for more than {calm}"
        return Memory(memory.since, recent, marked=step == "mark"), Decision(step, calm, why)
    return Memory(memory.since, recent), Decision("stay", seen.replicas, f"{_work(seen)}, enough for {asked}")


def _work(seen: Seen) -> str:
    return f"{seen.work} in work or waiting" + (f", {seen.coming} coming" if seen.coming else "")
