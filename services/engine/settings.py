"""What the engine is told."""

from typing import Literal

from shared.config import CommonSettings
from shared.errors import ConfigError

SamplingClass = Literal["base", "rejection"]


class EngineSettings(CommonSettings, frozen=True, kw_only=True):
    """FastDeploy's names and meanings; where a default is not FastDeploy's the reason stands beside it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel_size: int = 1
    quantization: Literal["none", "wint8", "wint4"] | None = None  # None: as config.json asks, else as stored
    max_num_seqs: int = 32  # in one step, 1 to 256. FastDeploy's own launches of this model pass 32, its default is 8
    max_num_batched_tokens: int = 8192  # in one step
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    sampling_class: SamplingClass = "rejection"  # how top_k and top_p find what they keep: the same, sorting or not
    block_size: int = 64
    gpu_memory_utilization: float = 0.9  # of the device, for us and for all others on it
    foreign_bytes: int = 0  # of it, what others hold or will: an mm_encoder on the same card may start after us
    num_gpu_blocks_override: int | None = None
    kv_cache_bytes: int = 1 << 30  # on the CPU: at most this, and never more than max_num_seqs full contexts


def check(settings: EngineSettings) -> None:
    """What the types of the settings cannot say.

    Raises:
        ConfigError: a value is out of its range, or two contradict each other; the message names them.
    """
    if settings.tensor_parallel_size != 1:
        raise ConfigError(f"tensor_parallel_size is {settings.tensor_parallel_size}; this engine runs on 1 device")
    if not 1 <= settings.max_num_seqs <= 256:
        raise ConfigError(f"max_num_seqs is {settings.max_num_seqs}; it must be 1 to 256")
    if not 0.0 < settings.gpu_memory_utilization <= 1.0:
        raise ConfigError(f"gpu_memory_utilization is {settings.gpu_memory_utilization}; it must be above 0, at most 1")
    for name in ("max_num_batched_tokens", "block_size", "kv_cache_bytes", "max_model_len"):
        if (value := getattr(settings, name)) < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if settings.foreign_bytes < 0:
        raise ConfigError(f"foreign_bytes is {settings.foreign_bytes}; it must be at least 0")
    if settings.num_gpu_blocks_override is not None and settings.num_gpu_blocks_override < 1:
        raise ConfigError(f"num_gpu_blocks_override is {settings.num_gpu_blocks_override}; it must be at least 1")
    if not settings.enable_chunked_prefill and settings.max_num_batched_tokens < settings.max_model_len:
        raise ConfigError(
            f"enable_chunked_prefill is false, so a prompt must fit into one step: max_num_batched_tokens is "
            f"{settings.max_num_batched_tokens} and max_model_len {settings.max_model_len}"
        )
