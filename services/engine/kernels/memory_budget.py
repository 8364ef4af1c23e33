"""Memory for speed alone: weights kept in two forms, rows copied into an order that suits a kernel."""

from functools import cache

import torch

SPARE_MEMORY_BYTES = 64 << 30  # of a device, from which on the some 4 GiB of such copies are affordable


def has_spare_memory(device: torch.device) -> bool:
    """Return True if this process may use enough of the device. Of a CPU, False: nothing is faster there."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _memory(index) * torch.cuda.get_per_process_memory_fraction(index) >= SPARE_MEMORY_BYTES


@cache
def _memory(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).total_memory)
