"""One choice of an answer that is not streamed, put together from its deltas."""

import msgspec

from shared.messages import Delta, PromptLogprobs, ShownLogprob, unpack_ids


class CollectedCall(msgspec.Struct, frozen=True):
    """Tool call of an answer."""

    id: str | None
    name: str | None
    arguments: str  # as the model wrote them: JSON, if it did well


class CollectedChoice:
    """Sum of a choice's deltas."""

    def __init__(self) -> None:
        self.logprobs: list[ShownLogprob] = []
        self.token_ids: list[int] = []
        self.prompt_ids: list[int] | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        self.finish_reason: str | None = None
        self.stop = ""  # the stop string that ended it
        self._reasoning: list[str] = []
        self._content: list[tuple[int, str]] = []  # with the number of calls that had begun before
        self._calls: dict[int, tuple[str | None, str | None, list[str]]] = {}

    def add(self, delta: Delta) -> None:
        """Append the next delta."""
        self._reasoning.append(delta.reasoning)
        self._content.append((len(self._calls), delta.content))
        self.logprobs += delta.logprobs
        self.token_ids += delta.token_ids
        self.prompt_ids = self.prompt_ids or prompt_ids(delta)
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop = delta.stop or self.stop
        for piece in delta.tool_calls:
            _, _, arguments = self._calls.setdefault(piece.index, (piece.id, piece.name, []))
            arguments.append(piece.arguments)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(text for _, text in self._content)

    def content_after(self, calls: int) -> str:
        """Return the content between `calls` calls and the next."""
        return "".join(text for before, text in self._content if before == calls)

    @property
    def calls(self) -> list[CollectedCall]:
        """The tool calls, in their order."""
        in_order = (self._calls[index] for index in sorted(self._calls))
        return [CollectedCall(call_id, name, "".join(arguments)) for call_id, name, arguments in in_order]


def prompt_ids(delta: Delta) -> list[int] | None:
    """Return the prompt's token ids; None from an engine of a release that does not send them."""
    return unpack_ids(delta.prompt) if delta.prompt else None
