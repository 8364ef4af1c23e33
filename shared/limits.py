"""Limit of an answer's tokens, by the length of its prompt; one rule for all services."""

from shared.errors import context_length


def resolve_max_tokens(prompt_tokens: int, requested: int | None, max_model_len: int) -> int:
    """Return the most tokens of an answer: `requested`, or all that the context leaves if that is less or None.

    Raises:
        RequestError: 400 context_length_exceeded, the prompt leaves no room for one token.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise context_length(prompt_tokens, max_model_len)
    return room if requested is None else min(requested, room)
