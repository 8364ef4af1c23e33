"""Thinking budget: when `</think>` replaces the sampled token. Pure functions of the generated tokens."""

import msgspec

UNLIMITED = 2**62  # tokens


class ThinkingBudget(msgspec.Struct, frozen=True):
    """Limit of `limit` tokens of thinking: the next one, or an end token before that, becomes `close_id`.

    The rule is the reference server's limit_thinking_content_length: forcing happens only while thinking is open, and
    never again once `close_id` has been generated, forced or not.
    """

    limit: int
    close_id: int  # </think>
    call_id: int | None = None  # <tool_call>, if it becomes `close_id`, too

    def exhausted(self, num_generated: int) -> bool:
        """Return True if the token after `num_generated` others must close an open thinking part."""
        return num_generated >= self.limit
