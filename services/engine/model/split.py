"""Split of the decoder's tensors over the ranks of tensor parallelism (`shared.model.division`)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Split:
    """One rank's part of `size` equal ones."""

    rank: int
    size: int

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """Return a view of this rank's part of a dimension."""
        length = whole.shape[dim] // self.size
        return whole.narrow(dim, self.rank * length, length)


WHOLE = Split(0, 1)
