"""Guesses that a server verified during a load, by its counters for Prometheus: ours and vLLM's have the same names."""

import math
import re
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException

from shared.errors import ConfigError

TIMEOUT_S = 10.0
_COUNTER = re.compile(
    r"^\w+[_:](spec_decode_num_draft_tokens|spec_decode_num_accepted_tokens|generation_tokens)_total(?:{.*})? (\S+)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Counters:
    """Tokens since the server's start, of all of its engines."""

    guessed: float
    right: float
    generated: float

    def since(self, before: "Counters") -> tuple[float, float]:
        """Return the share of guesses that were right, and of tokens that were guessed; NaN where there were none."""
        right, guessed = self.right - before.right, self.guessed - before.guessed
        generated = self.generated - before.generated
        return right / guessed if guessed else math.nan, right / generated if generated else math.nan


def read(url: str) -> Counters:
    """Read the counters at a URL.

    Raises:
        ConfigError: nothing answers there, or something without these counters.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply:
            text = reply.read().decode()
        found: dict[str, float] = {}
        for name, number in _COUNTER.findall(text):
            found[name] = found.get(name, 0.0) + float(number)
    except (OSError, ValueError, HTTPException) as error:
        raise ConfigError(f"--metrics: {url} cannot be read: {error}") from None
    if "generation_tokens" not in found:
        raise ConfigError(f"--metrics: {url} has no counter of generated tokens")
    return Counters(
        found.get("spec_decode_num_draft_tokens", 0.0),
        found.get("spec_decode_num_accepted_tokens", 0.0),
        found["generation_tokens"],
    )
