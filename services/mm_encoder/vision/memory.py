"""Device memory of the vision model, by arithmetic: an engine on the same card leaves it free.

weights   774 M parameters of the published model in 16 bits: 1.44 GiB
a pass    for each patch its row, one layer's query, key and value, two rotary tables; and between two
          products of a layer ROWS rows: 0.69 GiB for the largest image of 12.8 megapixels, 65,280 patches
graphs    of small passes (graphs.py), which share the memory of the largest
context   of CUDA and its libraries, and what the allocator rounds up

A card of LARGE_CARD bytes computes more rows at a time, with which its products are faster, and has graphs of larger
passes: 0.4 GiB more, which are not counted here, as the share of such a card that an engine leaves is ten times that.
"""

from shared.model.config import ModelConfig

ROWS = 3072  # rows computed at a time (rows.py): enough to fill a device, with tens of megabytes between two products
MANY_ROWS = 16384  # on a large card
LARGE_CARD = 40 << 30
GRAPH_PATCHES, LARGE_GRAPH_PATCHES = 1024, 8192  # the most in a pass that is captured
# 0.74 GiB were measured, and 0.18 that the allocator kept. A share of the card below 1 leaves what is missing here.
CONTEXT_BYTES = 512 << 20
_WIDE, _NARROW = 4, 2  # bytes of a rotary angle's cosine; of everything else


def rows_at_once(card_bytes: int) -> int:
    """Return the rows that are computed at a time on a card, or with 0 on a CPU."""
    return MANY_ROWS if card_bytes >= LARGE_CARD else ROWS


def graph_patches(card_bytes: int) -> int:
    """Return the most patches of a pass that is captured on a card."""
    return LARGE_GRAPH_PATCHES if card_bytes >= LARGE_CARD else GRAPH_PATCHES


def device_bytes(config: ModelConfig, patches: int) -> int:
    """Return the bytes of a process whose largest pass has `patches` patches."""
    graphs = pass_bytes(config, GRAPH_PATCHES)
    return weight_bytes(config) + pass_bytes(config, patches) + graphs + CONTEXT_BYTES


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
    whole = _NARROW * 4 * width + _WIDE * head_dim
    between = _NARROW * (vision.intermediate_size + 2 * width)
    return patches * whole + min(patches, ROWS) * between


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs
