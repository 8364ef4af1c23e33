"""Token counts of a request."""

from shared.messages import Begin, Usage


def usage_of(begin: Begin, completion_tokens: int, reasoning_tokens: int) -> Usage:
    """Return the usage that a client is told.

    `completion_tokens` counts every generated token, the stop token included; `reasoning_tokens` those up to and
    including </think>. The other counts are the engine's, from when it took the request for the first time.
    """
    return Usage(
        prompt_tokens=begin.prompt_tokens,
        completion_tokens=completion_tokens,
        reasoning_tokens=reasoning_tokens,
        cached_tokens=begin.cached_tokens,
        image_tokens=begin.image_tokens,
        video_tokens=begin.video_tokens,
    )
