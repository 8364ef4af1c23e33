"""The reasoning parser `ernie-45-vl-thinking`: what is thought and what is said.

The prompt ends inside an open <think>, so the model writes `reasoning "\\n</think>\\n\\n" answer`:

- The answer begins in reasoning if and only if the prompt ended with thinking open.
- Only the token </think> ends it. Ordinary tokens that spell "</think>" are text, and so is a </think> token that
  closes nothing. <tool_call> in reasoning is reasoning.
- All newlines right before </think> and right after it separate; they belong to neither text.
- Without </think> everything is reasoning, newlines at its end included, and the content is empty: thinking that was
  cut off by a limit never leaks into the answer.
"""


class Newlines:
    """Holds back newlines at the end of a growing text until it is known whether anything follows."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 0

    def push(self, text: str) -> str:
        """The text so far without the newlines at its end."""
        body = text.rstrip("\n")
        if not body:
            self.held += len(text)
            return ""
        shown = "\n" * self.held + body
        self.held = len(text) - len(body)
        return shown

    def release(self) -> str:
        """The newlines: they are part of the text."""
        held, self.held = "\n" * self.held, 0
        return held


class Reasoning:
    """One answer's split into reasoning and content."""

    __slots__ = ("_after", "_newlines", "open")

    def __init__(self, thinking: bool) -> None:
        self.open = thinking
        self._newlines = Newlines()
        self._after = False  # between </think> and the first character of the content

    @property
    def idle(self) -> bool:
        """No newline is held back or left out just now."""
        return not self._newlines.held and not self._after

    def think(self, text: str) -> str:
        """The reasoning to show when `text` comes while thinking."""
        return self._newlines.push(text)

    def end(self) -> None:
        """</think>."""
        self.open, self._after = False, True
        self._newlines.held = 0

    def say(self, text: str) -> str:
        """The content in `text`, which comes after thinking."""
        if self._after:
            text = text.lstrip("\n")
            self._after = not text
        return text

    def said(self) -> None:
        """The content has begun with something other than text."""
        self._after = False

    def finish(self) -> str:
        """The rest of the reasoning, when the answer ends while thinking."""
        return self._newlines.release()
