"""Exchange between cards that reach each other's memory, without a library between: see
`services.engine.kernels.triton.exchange`."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._symmetric_memory import _SymmetricMemory

from services.engine.kernels.peer_memory import PeerMemory
from services.engine.kernels.triton.exchange.add_norm import exchange_add_norm
from services.engine.kernels.triton.exchange.blocks import FOREVER
from services.engine.kernels.triton.exchange.push import BLOCK_BYTES, push
from shared.log import logger

# Bytes of a part. Longer ones are exchanged piece by piece: these are 2,048 rows of the published model.
ROOM = 10 << 20
ROWS, ROWS_ROOM = 256, 1280 << 10  # that are summed, exchanged and normed in one launch, and their bytes
TRIED = 3  # exchanges: both halves of the memory, and one of them again
LOOKS = 1 << 22  # for the other ranks in a trial: some seconds
FEW_LOOKS = 16  # in an exchange of nothing, which has the kernels compiled: ranks take different times for that
WIDTH = BLOCK_BYTES // 4  # numbers of a row in a trial
_ALIGNMENT = 256

_log = logger(__name__)


class Direct:
    """One rank's end."""

    def __init__(self, parts: PeerMemory, rows: PeerMemory) -> None:
        """
        Args:
            parts: of as many programs as blocks.
            rows: of a row for each program.
        """
        self._parts = parts
        self._rows = rows
        self.rows: PeerMemory | None = rows  # that kernels may use

    def gather(self, own: Tensor, limit: int = FOREVER) -> Tensor:
        """See `Exchange.gather`.

        Args:
            limit: looks for the other ranks.
        """
        own, parts = own.contiguous(), own.new_empty(self._parts.size, *own.shape)
        rows = self._parts.room // own[0].nbytes
        for start in range(0, len(own), rows):
            push(own[start : start + rows], parts[:, start : start + rows], self._parts, limit)
        return parts

    def prepare(self) -> None:
        """Have the kernels compiled. Nothing arrives: the others may not be there."""
        nothing = torch.zeros(1, WIDTH, device=self._parts.late.device)
        self.gather(nothing, FEW_LOOKS)
        self._add(nothing, FEW_LOOKS)
        for peers in (self._parts, self._rows):
            peers.late.zero_()

    def gathers(self) -> bool:
        """Return True if what the ranks write arrives."""
        said = self._numbers(self._parts.room // BLOCK_BYTES)
        tried = [self.gather(said[self._parts.rank] + nth, LOOKS).equal(said + nth) for nth in range(TRIED)]
        return all(tried) and not self._parts.late.item()

    def adds(self) -> bool:
        """Return True if the kernel that sums, exchanges and norms gives what it should."""
        said = self._numbers(min(len(self._rows.counts), self._rows.room // BLOCK_BYTES))
        tried = [self._add(said[self._rows.rank] + nth, LOOKS).equal((said + nth).sum(0)) for nth in range(TRIED)]
        return all(tried) and not self._rows.late.item()

    def _numbers(self, rows: int) -> Tensor:
        """Return what each rank says in a trial. Sums are exact."""
        shape = self._parts.size, rows, WIDTH
        return torch.arange(math.prod(shape), dtype=torch.float32, device=self._parts.late.device).view(shape) % 1009

    def _add(self, own: Tensor, limit: int) -> Tensor:
        """Return the sum of all ranks' rows, which are taken for results of one expert."""
        nothing, one = torch.zeros_like(own), torch.ones(len(own), 1, device=own.device)
        norm = torch.ones(WIDTH, device=own.device)
        return exchange_add_norm(own, one, nothing.unsqueeze(0), nothing, norm, 1e-5, self._rows, limit)[1]


def allocate(rank: int, size: int, device: torch.device) -> Direct:
    """Allocate the memory, and wait until all ranks have.

    Raises:
        RuntimeError: the memory cannot be shared.
    """
    direct = Direct(*(_share(rank, size, device, *of) for of in ((ROOM, ROOM // BLOCK_BYTES), (ROWS_ROOM, ROWS))))
    direct.prepare()
    torch.cuda.synchronize(device)
    return direct


def _share(rank: int, size: int, device: torch.device, room: int, programs: int) -> PeerMemory:
    start = -(-8 * programs * size // _ALIGNMENT) * _ALIGNMENT  # of the data, behind the flags
    name = dist.group.WORLD.group_name
    memory = _SymmetricMemory.empty_strided_p2p((start + 2 * size * room,), [1], torch.uint8, device, name)
    memory.zero_()
    torch.cuda.synchronize(device)  # before any other rank writes to it
    addresses = _SymmetricMemory.rendezvous(memory).buffer_ptrs
    flags = torch.tensor(addresses, dtype=torch.int64, device=device)
    counts, late = (torch.zeros(n, dtype=of, device=device) for n, of in ((programs, torch.int64), (1, torch.int32)))
    return PeerMemory(rank, room, flags + start, flags, counts, late, memory)


def connect(
    rank: int,
    size: int,
    device: torch.device,
    least: Callable[[int], int],
    make: Callable[[int, int, torch.device], Direct] = allocate,
) -> Direct | None:
    """Return the direct exchange if it works for all ranks. All must call this. Flags are written by atomic operations,
    which not every link carries: then nothing arrives in the trial.

    Args:
        least: returns the least of all ranks' numbers.
    """
    if not least(int(reaches(rank, size))):
        return None
    direct = attempt(lambda: make(rank, size, device))
    if not least(int(direct is not None)):
        return None
    assert direct is not None
    if not least(int(direct.gathers())):
        _log.warning("cards exchange by NCCL: what one writes to another's memory does not arrive")
        return None
    if not least(int(direct.adds())):
        _log.warning("few rows are not exchanged in the launch that computes them: its results are wrong here")
        direct.rows = None
    return direct


def reaches(rank: int, size: int) -> bool:
    """Return True if this rank's card may use the memory of all others."""
    return all(torch.cuda.can_device_access_peer(rank, other) for other in range(size) if other != rank)


def attempt(make: Callable[[], Direct]) -> Direct | None:
    """Return what `make` makes, if it can."""
    try:
        return make()
    except RuntimeError as error:
        _log.warning("cards exchange by NCCL: they do not share memory", extra={"reason": str(error)})
        return None
