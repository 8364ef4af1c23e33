"""Memory of cards that reach each other's, by which the same programs of a launch on all of them exchange blocks: see
`services.engine.kernels.triton.exchange.blocks`."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """One rank's view."""

    rank: int
    room: int  # bytes of a part
    data: Tensor  # [ranks] int64, addresses of 2 x ranks x room bytes of each rank
    flags: Tensor  # [ranks] int64, addresses of programs x ranks flags of each rank, int64, which begin as 0
    counts: Tensor  # [programs] int64, of exchanges so far, of this rank alone; they begin as 0
    late: Tensor  # [1] int32, becomes 1 if another rank was not there after as many looks as were allowed
    own: Tensor  # the memory of this rank, which lives as long as this does

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.data)
