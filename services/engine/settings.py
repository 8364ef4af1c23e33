"""Settings of the engine."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.config import CommonSettings, Count, LoadFormat, Positive
from shared.errors import ConfigError

SamplingClass = Literal["base", "rejection"]


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's and FastDeploy's keys of speculative decoding, those that have a meaning here."""

    method: Literal["ngram"]  # guess what followed the same tokens before, in prompt and answer
    num_speculative_tokens: Annotated[int, Meta(ge=0, le=255)]  # guessed tokens of a sequence in a step; 0: none
    prompt_lookup_min: Annotated[int, Meta(ge=1, le=64)] = 3  # tokens that must have come before in the same order
    disable_by_batch_size: Positive = 16  # more sequences than this that decode in a step are not guessed for


class EngineSettings(CommonSettings, frozen=True, kw_only=True):
    """FastDeploy's names and meanings; a default that is not FastDeploy's has its reason beside it.

    Raises:
        ConfigError: a value is out of its range, or two contradict each other; the message names them.
    """

    # auto: weights as the checkpoint has them; dummy: drawn at random, which needs config and tokenizer only.
    load_format: LoadFormat = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # the device; auto: the GPU where there is one
    # Devices that share one model, each with a process of its own: a number that divides its heads and inner widths.
    tensor_parallel_size: int = 1
    # How weights are quantised as they load; unset: as config.json asks, else as they are stored.
    quantization: Literal["none", "wint8", "wint4"] | None = None
    # FastDeploy's own launches of this model pass 32, its default is 8.
    max_num_seqs: int = 32  # sequences in one step, 1 to 256
    # Tokens in one step; 0: by device, which is 512 on a CPU, 2048 on a GPU of less than 32 GiB, and else 8192.
    max_num_batched_tokens: int = 0
    # Milliseconds that a step with prefill may take beside sequences that decode: the gap between their tokens. Prefill
    # gets as many tokens as were measured to fit (on a GPU at the start, on a CPU as it runs), or fewer where these
    # are computed nearly as fast, and never less than 128; short prompts go first. 0: no bound, and prompts go by
    # arrival.
    max_token_gap_ms: Annotated[float, Meta(ge=0)] = 25.0
    enable_chunked_prefill: bool = True  # split long prompts over several steps
    enable_prefix_caching: bool = True  # reuse cached keys and values of what prompts have in common
    sampling_class: SamplingClass = (
        "rejection"  # how top_k and top_p find what they keep: base sorts, rejection searches
    )
    block_size: int = 64  # tokens in a block of the KV cache; on a GPU a power of two, at least 16
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory, above 0 to 1, for us and all others on it
    foreign_bytes: int = 0  # GPU memory that an mm_encoder on the same GPU holds or will hold
    # Whether a row's sums are the same whatever is computed beside it: slower on a GPU, on a CPU no different.
    batch_invariant: bool = False
    num_gpu_blocks_override: int | None = None  # blocks of the KV cache; unset: as many as memory allows
    torch_threads: Count = 0  # threads of torch on a CPU, shared by ranks; 0: one for each core we may use
    # Speculative decoding, which changes no answer (docs/speculation.md); unset: none.
    speculative_config: SpeculativeConfig | None = None
    segments_dir: str = ""  # mm_encoder's directory of that name, where this host has one and we see it; empty: none
    step_timeout_s: Annotated[float, Meta(ge=0)] = 20.0  # seconds after which a step is taken to hang; 0: no bound
    kv_cache_bytes: int = 1 << 30  # the KV cache on a CPU, at most; never more than max_num_seqs full contexts

    def facts(self) -> dict[str, str]:
        return {"quantization": self.quantization or "unset", "load_format": self.load_format}

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= 256:
            raise ConfigError(f"max_num_seqs is {self.max_num_seqs}; it must be 1 to 256")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0, at most 1")
        for name in ("tensor_parallel_size", "block_size", "kv_cache_bytes", "max_model_len"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        guesses = self.speculative_config.num_speculative_tokens if self.speculative_config else 0
        if guesses >= self.max_num_seqs:
            raise ConfigError(
                f"speculative_config has num_speculative_tokens {guesses}; a step samples max_num_seqs "
                f"({self.max_num_seqs}) tokens at most, of which one is no guess"
            )
        for name in ("max_num_batched_tokens", "foreign_bytes"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name} is {value}; it must be at least 0")
        if self.num_gpu_blocks_override is not None and self.num_gpu_blocks_override < 1:
            raise ConfigError(f"num_gpu_blocks_override is {self.num_gpu_blocks_override}; it must be at least 1")
        if not self.enable_chunked_prefill and 0 < self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"enable_chunked_prefill is false, so a prompt must fit into one step: max_num_batched_tokens is "
                f"{self.max_num_batched_tokens} and max_model_len {self.max_model_len}"
            )
