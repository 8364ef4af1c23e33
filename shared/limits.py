"""The one rule that turns a prompt's length into the number of tokens its answer may have."""

from shared.errors import context_length


def resolve_max_tokens(prompt_tokens: int, requested: int | None, max_model_len: int) -> int:
    """The tokens an answer may have: what was asked for, at most what the context leaves (None asks for all of it).

    Raises:
        RequestError: 400 context_length_exceeded, the prompt leaves no room for one token.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise context_length(prompt_tokens, max_model_len)
    return room if requested is None else min(requested, room)
