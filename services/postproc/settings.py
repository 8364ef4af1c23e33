"""Settings of postproc."""

from services.postproc.text.answer import Parsers
from shared.config import CommonSettings, Positive, variable
from shared.errors import ConfigError

ERNIE_VL_THINKING = "ernie-45-vl-thinking"


class PostprocSettings(CommonSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `python -m services.postproc`, besides the common ones.

    An empty parser name turns the parser off: all that the model writes is content.

    Raises:
        ConfigError: a parser is unknown; the message names the setting and the parsers there are.
    """

    reasoning_parser: str = ERNIE_VL_THINKING  # what tells reasoning from the answer; empty: nothing does
    tool_call_parser: str = ERNIE_VL_THINKING  # what finds tool calls in the answer; empty: nothing does
    tool_calls_in_reasoning: bool = True  # a complete call at the end of reasoning that nothing ends is a call
    journal_every: Positive = 64  # tokens of a request between two writes of its journal
    read_count: Positive = 128  # steps read at once, when behind
    trim_every: Positive = 256  # steps between two trims of a shard's stream
    deltas_max_len: Positive = 10_000  # messages that a gateway's stream keeps, about

    def facts(self) -> dict[str, str]:
        return {
            "reasoning_parser": self.reasoning_parser or "none",
            "tool_call_parser": self.tool_call_parser or "none",
            "tool_calls_in_reasoning": str(self.tool_calls_in_reasoning),
        }

    def __post_init__(self) -> None:
        parsers = {"reasoning_parser": self.reasoning_parser, "tool_call_parser": self.tool_call_parser}
        for field, name in parsers.items():
            if name not in ("", ERNIE_VL_THINKING):
                raise ConfigError(f'{variable(field)} is {name!r}; known: {ERNIE_VL_THINKING!r}, and "" for none')

    def parsers(self) -> Parsers:
        """Return the parsers that are turned on."""
        return Parsers(bool(self.reasoning_parser), bool(self.tool_call_parser), self.tool_calls_in_reasoning)
