"""Driver of Triton for a card that is not there, with the answers that compiling needs. For programs that compile only:
Triton is told once a process whether it compiles or interprets."""

from triton.backends.compiler import GPUTarget


class NoDriver:
    """Driver of one device of a capability: 90, say."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
