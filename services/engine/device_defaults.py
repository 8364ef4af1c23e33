"""Defaults that depend on the device: what settings leave open rank 0 decides once, before anything is loaded."""

from collections.abc import Iterator

from msgspec.structs import replace

from services.engine.settings import EngineSettings

# Tokens of a step. On a CPU a step of 8,192 takes minutes with the published model, and nobody else gets a token
# meanwhile; prompts of 3,000 are computed as fast by 512 at a time. On a card of 24 GB every 1,000 tokens of a step
# take 85 MiB, which is 1,600 tokens of the cache (docs/notebook/engine.md).
CPU_TOKENS, SMALL_CARD_TOKENS, CARD_TOKENS = 512, 2048, 8192
SMALL_CARD_BYTES = 32 << 30


def decide(settings: EngineSettings, card: int | None) -> EngineSettings:
    """Return settings that leave nothing open to the device; what is set stays as it is.

    Args:
        card: bytes of a GPU; None: it is a CPU.
    """
    return replace(settings, max_num_batched_tokens=settings.max_num_batched_tokens or step_tokens(settings, card))


def step_tokens(settings: EngineSettings, card: int | None) -> int:
    """Return the tokens of a step: those that suit the device, and a whole prompt's where it must not be split."""
    tokens = CPU_TOKENS if card is None else SMALL_CARD_TOKENS if card < SMALL_CARD_BYTES else CARD_TOKENS
    return tokens if settings.enable_chunked_prefill else max(tokens, settings.max_model_len)


def decided(open_settings: EngineSettings, settings: EngineSettings) -> Iterator[str]:
    """Describe what was decided."""
    if not open_settings.max_num_batched_tokens:
        yield f"max_num_batched_tokens is {settings.max_num_batched_tokens} on this device"
