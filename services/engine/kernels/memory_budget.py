"""Whether a device has memory for what is only faster: weights in two forms, copies in an order that suits a kernel."""

from functools import cache

import torch

ENOUGH = 64 << 30  # bytes, of which such things take some 4 GiB


def roomy(device: torch.device) -> bool:
    """By what this process may use of the device. A CPU is not: nothing is faster there."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _memory(index) * torch.cuda.get_per_process_memory_fraction(index) >= ENOUGH


@cache
def _memory(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).total_memory)
