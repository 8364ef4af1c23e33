"""The reasoning parser `ernie-45-vl-thinking`: splits an answer into reasoning and content.

The prompt ends inside an open <think>, so the model writes `reasoning "\\n</think>\\n\\n" answer`:

- The answer begins in reasoning if and only if the prompt ended with thinking open.
- Only the token </think> ends it. Ordinary tokens that spell "</think>" are text, and so is a </think> token that
  closes nothing. <tool_call> in reasoning is reasoning.
- All newlines right before </think> and right after it separate; they belong to neither text.
- Without </think> everything is reasoning, newlines at its end included, and the content is empty: thinking that was
  cut off by a limit never leaks into the answer.
"""


class TrailingNewlines:
    """The newlines at the end of a growing text, held back until it is known whether text follows."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 0

    def hold_back(self, text: str) -> str:
        """Append `text` and return what can be shown: all but the newlines at its end."""
        body = text.rstrip("\n")
        if not body:
            self.held += len(text)
            return ""
        shown = "\n" * self.held + body
        self.held = len(text) - len(body)
        return shown

    def release(self) -> str:
        """Return the newlines that were held back: they are part of the text."""
        held, self.held = "\n" * self.held, 0
        return held


class ReasoningSplit:
    """Split of one answer into reasoning and content. `open` while the model reasons."""

    __slots__ = ("_newlines", "_skips_newlines", "open")

    def __init__(self, thinking: bool) -> None:
        self.open = thinking
        self._newlines = TrailingNewlines()
        self._skips_newlines = False  # between </think> and the first character of the content

    @property
    def idle(self) -> bool:
        """True if text without a newline at its end would be shown as it is."""
        return not self._newlines.held and not self._skips_newlines

    def add_reasoning(self, text: str) -> str:
        """Append to the reasoning and return what of it can be shown."""
        return self._newlines.hold_back(text)

    def end_reasoning(self) -> None:
        """Switch to the content, at </think>. The newlines before it are dropped."""
        self.open, self._skips_newlines = False, True
        self._newlines.held = 0

    def add_content(self, text: str) -> str:
        """Append to the content and return it without the newlines that separate it from the reasoning."""
        if self._skips_newlines:
            text = text.lstrip("\n")
            self._skips_newlines = not text
        return text

    def begin_content(self) -> None:
        """Note that the content has begun with something other than text."""
        self._skips_newlines = False

    def release_reasoning(self) -> str:
        """Return the rest of the reasoning, when the answer ends inside it."""
        return self._newlines.release()
