"""Merging of deltas for a client that reads slowly."""

from collections.abc import Iterable

import msgspec

from shared.messages import Delta


def merge_text(deltas: Iterable[tuple[int, Delta]]) -> list[tuple[int, Delta]]:
    """Merge neighbouring deltas of plain text of the same choice, so that a stream that lags has less to write."""
    merged: list[tuple[int, Delta]] = []
    run: list[Delta] = []
    for index, delta in deltas:
        if run and not (index == merged[-1][0] and _joins(run[-1], delta)):
            merged[-1] = (merged[-1][0], _join(run))
            run = []
        if not run:
            merged.append((index, delta))
        run.append(delta)
    if run:
        merged[-1] = (merged[-1][0], _join(run))
    return merged


def _joins(first: Delta, second: Delta) -> bool:
    return is_text(first) and is_text(second) and bool(first.content) == bool(second.content)


def is_text(delta: Delta) -> bool:
    """Return True for only reasoning or only content, and nothing that belongs to a single token."""
    return bool(delta.reasoning) != bool(delta.content) and not (
        delta.tool_calls
        or delta.later
        or delta.logprobs
        or delta.token_ids
        or delta.prompt
        or delta.prompt_logprobs
        or delta.finish_reason
        or delta.failure
    )


def _join(run: list[Delta]) -> Delta:
    if len(run) == 1:
        return run[0]
    return msgspec.structs.replace(
        run[-1],
        start=run[0].start,
        reasoning="".join(d.reasoning for d in run),
        content="".join(d.content for d in run),
        usage=run[-1].usage or run[0].usage,
    )
