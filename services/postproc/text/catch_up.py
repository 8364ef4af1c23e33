"""Rebuild the part of an answer that a reader has missed, from its tokens alone."""

from collections.abc import Sequence

from msgspec.structs import replace

from services.postproc.text.answer import Answer
from shared.messages import Delta, Finish, TokenLogprob


def missed_deltas(
    answer: Answer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None] | None,
    finish: Finish | None,
    after: int,
    until: int = 0,
) -> list[Delta]:
    """Return all that follows sequence number `after`: one delta, two if a delta ends at `until`, or none.

    A reader that has seen the end of an answer gets the end once more, so that it does not wait for more.

    Args:
        answer: fresh, with its Begin.
        tokens: all that the engine has generated so far, without a stop token.
        logprobs: of the tokens, for a request that asked for them.
        finish: how the engine or postproc ended the answer; None while it goes on or where a stop string ends it.
    """

    def fold(first: int, end: int) -> None:
        for place in range(first, min(end, len(tokens))):
            answer.push_token(tokens[place], logprobs[place] if logprobs is not None else None)

    def finish_answer() -> None:
        if finish is not None and finish.stop_token is not None:
            answer.push_stop_token(finish.stop_token, finish.logprob)
        if finish is not None:
            answer.apply_finish(finish)

    fold(0, after)
    if after > len(tokens):
        finish_answer()
    seen = answer.take_delta()
    if answer.ended:
        return [_only_the_end(seen, after)] if seen else []
    deltas: list[Delta] = []
    first = after
    for last in [until] * (until > after) + [max(after, len(tokens)) + 1]:
        fold(first, last)
        if first <= len(tokens) < last:
            finish_answer()
        if delta := answer.take_delta():
            deltas.append(delta if deltas else replace(delta, start=after))
        first = last
    return deltas


def _only_the_end(delta: Delta, after: int) -> Delta:
    """Return the finish, its stop string, usage and failure of the last delta, without its text."""
    return Delta(
        delta.request_id,
        delta.seq,
        finish_reason=delta.finish_reason,
        usage=delta.usage,
        failure=delta.failure,
        start=after,
        stop=delta.stop,
    )
