"""Defaults that depend on the device: what settings leave open rank 0 decides once, before anything is loaded."""

from collections.abc import Iterator

from msgspec.structs import replace

from services.engine.settings import EngineSettings, SpeculativeConfig

# Tokens of a step. On a CPU a step of 8,192 takes minutes with the published model, and nobody else gets a token
# meanwhile; prompts of 3,000 are computed as fast by 512 at a time. On a card of 24 GB every 1,000 tokens of a step
# take 85 MiB, which is 1,600 tokens of the cache (docs/notebook/engine.md).
CPU_TOKENS, SMALL_CARD_TOKENS, CARD_TOKENS = 512, 2048, 8192
SMALL_CARD_BYTES = 32 << 30
GUESSES = 8


def decide(settings: EngineSettings, card: int | None) -> EngineSettings:
    """Return settings that leave nothing open to the device; what is set stays as it is.

    Args:
        card: bytes of a GPU; None: it is a CPU.
    """
    tokens = settings.max_num_batched_tokens or step_tokens(settings, card)
    return replace(settings, max_num_batched_tokens=tokens, speculative_config=guesses(settings, card))


def step_tokens(settings: EngineSettings, card: int | None) -> int:
    """Return the tokens of a step: those that suit the device, and a whole prompt's where it must not be split."""
    tokens = CPU_TOKENS if card is None else SMALL_CARD_TOKENS if card < SMALL_CARD_BYTES else CARD_TOKENS
    return tokens if settings.enable_chunked_prefill else max(tokens, settings.max_model_len)


def guesses(settings: EngineSettings, card: int | None) -> SpeculativeConfig | None:
    """Return how tokens are guessed; None: they are not. By default they are on one GPU (docs/speculation.md)."""
    asked = settings.speculative_config
    if asked is not None:
        return asked if asked.num_speculative_tokens else None
    most = min(GUESSES, settings.max_num_seqs - 1)
    if card is None or settings.tensor_parallel_size > 1 or not most:
        return None
    return SpeculativeConfig(method="ngram", num_speculative_tokens=most)


def decided(open_settings: EngineSettings, settings: EngineSettings) -> Iterator[str]:
    """Describe what was decided."""
    if not open_settings.max_num_batched_tokens:
        yield f"max_num_batched_tokens is {settings.max_num_batched_tokens} on this device"
    if open_settings.speculative_config is None and settings.speculative_config is not None:
        guessed = settings.speculative_config.num_speculative_tokens
        yield f"speculative_config guesses up to {guessed} tokens of a sequence in a step on this device"
