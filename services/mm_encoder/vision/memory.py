"""Device memory of the vision model, by arithmetic: an engine on the same card leaves it free.

weights   774 M parameters of the published model in 16 bits: 1.44 GiB
a pass    for each patch its pixels, its row, one layer's key and value, two rotary tables; and between two products
          of a layer ROWS rows: 0.71 GiB for the largest image of 12.8 megapixels, 65,280 patches
context   of CUDA and its libraries, and what the allocator rounds up
"""

from shared.model.config import ModelConfig

ROWS = 4096  # rows computed at a time (rows.py): enough to fill a device, with tens of megabytes between two products
CONTEXT_BYTES = 512 << 20
_WIDE, _NARROW = 4, 2  # bytes of a rotary angle's cosine; of everything else


def device_bytes(config: ModelConfig, patches: int) -> int:
    """Return the bytes of a process whose largest pass has `patches` patches."""
    return weight_bytes(config) + pass_bytes(config, patches) + CONTEXT_BYTES


def weight_bytes(config: ModelConfig) -> int:
    """Return the bytes of the weights."""
    vision = config.vision
    width, inner = vision.hidden_size, vision.intermediate_size
    joined = width * vision.spatial_merge_size**2
    block = (
        _linear(width, 3 * width) + _linear(width, width) + _linear(width, inner) + _linear(inner, width) + 4 * width
    )
    tower = vision.in_channels * vision.patch_size**2 * width + vision.depth * block + 2 * width
    spatial = 2 * _linear(joined, joined) + 2 * joined
    temporal = _linear(vision.temporal_merge_size * joined, joined) + _linear(joined, joined) + 2 * joined
    resampler = spatial + temporal + _linear(joined, config.hidden_size) + config.hidden_size
    return _NARROW * (tower + resampler)


def pass_bytes(config: ModelConfig, patches: int) -> int:
    """Return the most bytes in use while `patches` patches are encoded, beside the weights."""
    vision = config.vision
    width, head_dim = vision.hidden_size, vision.hidden_size // vision.num_heads
    pixels = vision.in_channels * vision.patch_size**2
    whole = _NARROW * (pixels + 3 * width) + _WIDE * 2 * head_dim
    between = _NARROW * (3 * vision.intermediate_size + 2 * width)
    return patches * whole + ROWS * between


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs
