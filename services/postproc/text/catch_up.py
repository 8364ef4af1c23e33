"""What somebody who has seen an answer up to some number has missed of it, from its tokens alone."""

from collections.abc import Sequence

from msgspec.structs import replace

from services.postproc.text.answer import Answer
from shared.messages import Delta, Finish, TokenLogprob


def missed(
    answer: Answer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None] | None,
    finish: Finish | None,
    after: int,
    until: int = 0,
) -> list[Delta]:
    """All that follows number `after`, as one delta, or as two if a delta ends at `until`; none if there is nothing.

    The end of an answer is said again to who has seen it, so that nobody waits for more.

    Args:
        answer: fresh, with its Begin.
        tokens: all so far, without a stop token.
        logprobs: of the tokens, for a request that asked.
        finish: how the answer ended, if not by itself.
    """

    def push(first: int, end: int) -> None:
        for place in range(first, min(end, len(tokens))):
            answer.push(tokens[place], logprobs[place] if logprobs is not None else None)

    def end() -> None:
        if finish is not None and finish.stop_token is not None:
            answer.push_stop_token(finish.stop_token)
        if finish is not None:
            answer.finish(finish)

    push(0, after)
    if after > len(tokens):
        end()
    seen = answer.take()
    if answer.ended:
        return [_only_the_end(seen, after)] if seen else []
    deltas: list[Delta] = []
    first = after
    for last in [until] * (until > after) + [max(after, len(tokens)) + 1]:
        push(first, last)
        if first <= len(tokens) < last:
            end()
        if delta := answer.take():
            deltas.append(delta if deltas else replace(delta, start=after))
        first = last
    return deltas


def _only_the_end(delta: Delta, after: int) -> Delta:
    return Delta(
        delta.request_id,
        delta.seq,
        finish_reason=delta.finish_reason,
        usage=delta.usage,
        failure=delta.failure,
        start=after,
    )
