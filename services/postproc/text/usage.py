"""Token counts of a request that has ended."""

from shared.messages import Begin, Usage


def usage_of(begin: Begin, completion_tokens: int, reasoning_tokens: int) -> Usage:
    """`completion_tokens` counts every generated token, the one that stopped it included; `reasoning_tokens` those
    up to and including </think>. The rest is what the engine saw when it took the request for the first time."""
    return Usage(
        prompt_tokens=begin.prompt_tokens,
        completion_tokens=completion_tokens,
        reasoning_tokens=reasoning_tokens,
        cached_tokens=begin.cached_tokens,
        image_tokens=begin.image_tokens,
        video_tokens=begin.video_tokens,
    )
