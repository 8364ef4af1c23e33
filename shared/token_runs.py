"""Acceptance rule for runs of tokens: at-least-once delivery made exactly-once, by epoch and index.

Each run carries the epoch (fencing token) of the engine that wrote it and the index of its first token. postproc, which
keeps a request's tokens for the client, and an engine that resumes the request apply this rule to every run; so both
keep the same tokens, whatever is delivered twice, late, or by an engine that was declared dead.
"""

from enum import Enum

from shared.messages import TokenRun


class Verdict(Enum):
    """Relation of a run to the tokens that a reader has."""

    STALE = "stale"  # written by a former owner: neither its tokens nor its finish count
    GAP = "gap"  # tokens before it are missing, which only a Redis that lost writes can cause: its tokens do not count
    NEXT = "next"  # its tokens from `known_tokens` on are the next ones, none if all are known


def judge_run(run: TokenRun, epoch: int, count: int) -> Verdict:
    """Judge a run, given the newest epoch seen and the number of tokens that the reader has."""
    if run.epoch < epoch:
        return Verdict.STALE
    return Verdict.GAP if run.index > count else Verdict.NEXT


def known_tokens(run: TokenRun, count: int) -> int:
    """Return how many of a run's tokens, from its first on, a reader with `count` tokens has already."""
    return count - run.index
