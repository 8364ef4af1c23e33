"""Division of a model over the ranks of tensor parallelism: the part of each has some heads, and some of every width
inside a block. What is a token's as a whole (embedding, head, norms, routers) every rank has."""

import msgspec

from shared.errors import ConfigError
from shared.model.config import ModelConfig

# Fields of the configuration that are divided, and what they count.
_DIVIDED = {
    "num_heads": "attention heads",
    "num_kv_heads": "key-value heads",
    "intermediate_size": "inner values of dense blocks",
    "text_expert_size": "inner values of text experts",
    "vision_expert_size": "inner values of vision experts",
    "shared_expert_size": "inner values of shared experts",
}


def divided(config: ModelConfig, size: int) -> ModelConfig:
    """Return the configuration of one rank's part.

    Raises:
        ConfigError: `size` ranks cannot share the model equally; the message has the numbers.
    """
    uneven = [f"{getattr(config, name)} {what}" for name, what in _DIVIDED.items() if getattr(config, name) % size]
    if uneven:
        possible = ", ".join(str(n) for n in (1, 2, 4, 8, 16) if not any(getattr(config, f) % n for f in _DIVIDED))
        raise ConfigError(
            f"tensor_parallel_size is {size}, and this model's {' and '.join(uneven[:2])} cannot be shared equally "
            f"by so many; it can be {possible}"
        )
    return msgspec.structs.replace(config, **{name: getattr(config, name) // size for name in _DIVIDED})
