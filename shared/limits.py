"""Limits on what a request asks for, by the length of its prompt; one rule for all services."""

from shared.errors import context_length, invalid

# Log-probabilities of prompts that one request may ask for, its answers together: 2 MB as they travel, some 10 as JSON.
MAX_PROMPT_LOGPROBS = 1 << 18


def resolve_max_tokens(prompt_tokens: int, requested: int | None, max_model_len: int, param: str = "messages") -> int:
    """Return the most tokens of an answer: `requested`, or all that the context leaves if that is less or None.

    Raises:
        RequestError: 400 context_length_exceeded, the prompt leaves no room for one token.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise context_length(prompt_tokens, max_model_len, param)
    return room if requested is None else min(requested, room)


def check_prompt_logprobs(prompt_tokens: int, count: int | None) -> None:
    """Check how many log-probabilities are asked for: of each token of the prompt, and `count` of the most likely ones.

    Raises:
        RequestError: 400, too many.
    """
    if count is None or prompt_tokens * (1 + count) <= MAX_PROMPT_LOGPROBS:
        return
    text = (
        f"`prompt_logprobs`: {prompt_tokens} tokens of prompts with {1 + count} log-probabilities each are more than "
    )
    raise invalid(f"{text}the limit of {MAX_PROMPT_LOGPROBS} in all.", "prompt_logprobs")
