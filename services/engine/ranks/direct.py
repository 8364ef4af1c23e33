"""Exchange between cards that reach each other's memory, without a library between: see
`services.engine.kernels.triton.exchange`.

It is used where a trial at the start, of the kernels as the model compiles them, gives what it should on all ranks.
A trial in which nothing arrives must end long before the start is given up (`services.engine.ranks.processes.LINK_S`):
see `LOOKS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from services.engine.kernels.peer_memory import PeerMemory
from services.engine.kernels.reference.rms_norm import rms_norm
from services.engine.kernels.triton.common.sizes import ceil_div
from services.engine.kernels.triton.dense.linear import MOST_SPLITS
from services.engine.kernels.triton.exchange.add_norm import exchange_add_norm
from services.engine.kernels.triton.exchange.blocks import FOREVER
from services.engine.kernels.triton.exchange.push import BLOCK_BYTES, push
from services.engine.model.weights import dtype_of
from shared.log import logger
from shared.model.config import ModelConfig

# Bytes of a part. Longer ones are exchanged piece by piece: these are 2,048 rows of the published model.
ROOM = 10 << 20
ROWS, ROWS_ROOM = 256, 1280 << 10  # that are summed, exchanged and normed in one launch, and their bytes
USES = (ROOM, ROOM // BLOCK_BYTES), (ROWS_ROOM, ROWS)  # of memory: bytes of a part, and programs that write it
# Looks for the other ranks in an exchange of a trial, of 1 to 2 us each: 4 s at most. A rank stops at its first failure
# and the others at their next exchange, so each of the two trials waits twice at most: 8 s where nothing arrives, 16 in
# all. The ranks begin within milliseconds of each other, with all kernels compiled.
LOOKS = 1 << 21
FEW_LOOKS = 16  # in an exchange of nothing, which has the kernels compiled: ranks take different times for that
EPS, NORM_ERROR = 1e-5, 2**-6  # of a trial; two roundings to bfloat16
_ALIGNMENT = 256

_log = logger(__name__)
T = TypeVar("T")
Use = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Form:
    """Rows that a model's ranks exchange. Kernels are compiled for each form."""

    dtype: torch.dtype
    width: int  # of a row
    experts: int  # of a row

    @classmethod
    def of(cls, config: ModelConfig) -> "Form":
        """Return a model's form."""
        return cls(dtype_of(config), config.hidden_size, config.experts_per_token)


class Direct:
    """One rank's end."""

    def __init__(self, parts: PeerMemory, rows: PeerMemory, form: Form) -> None:
        """
        Args:
            parts: of as many programs as blocks.
            rows: of a row for each program.
            form: of what is tried.
        """
        self._parts = parts
        self._rows = rows
        self._form = form
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
        self._gathered(0, 1, FEW_LOOKS)
        for parts in range(1, MOST_SPLITS + 1):
            self._added(0, 1, parts, FEW_LOOKS)
        for peers in (self._parts, self._rows):
            peers.late.zero_()

    def gathers(self) -> bool:
        """Return True if what the ranks write arrives, in both halves of the memory. Few programs try: all of them run
        at once."""
        return all(self._gathered(nth, rows, LOOKS) for nth, rows in enumerate([1, self._most] * 2))

    def adds(self) -> bool:
        """Return True if the kernel that sums, exchanges and norms gives what it should, with the shared expert's
        result in one part and in several: all that are compiled."""
        tried = [(parts, rows) for parts in range(1, MOST_SPLITS + 1) for rows in (1, self._most)]
        return all(self._added(nth, rows, parts, LOOKS) for nth, (parts, rows) in enumerate(tried))

    @property
    def _most(self) -> int:
        """Rows for which there is room in one launch that sums, exchanges and norms."""
        return min(len(self._rows.counts), self._rows.room // (self._form.width * self._form.dtype.itemsize))

    def _gathered(self, nth: int, rows: int, limit: int) -> bool:
        """Exchange rows, and return True if all have arrived."""
        said = torch.stack([self._numbers(rank, nth, 255, rows, self._form.width) for rank in range(self._parts.size)])
        said = said.to(self._form.dtype)
        return self.gather(said[self._parts.rank], limit).equal(said) and not self._parts.late.item()

    def _added(self, nth: int, rows: int, parts: int, limit: int) -> bool:
        """Put blocks of experts together, and return True if both results are as they should be."""
        form = self._form
        residual = self._numbers(0, -1, 5, rows, form.width).to(form.dtype)
        norm = 1 + self._numbers(0, -2, 5, form.width).to(form.dtype) / 8
        results = [self._results(rank, nth, rows, parts) for rank in range(self._rows.size)]
        found = exchange_add_norm(*results[self._rows.rank], residual, norm, EPS, self._rows, limit)
        summed = torch.stack([self._sum(*of) for of in results]).sum(0)
        total = (residual + summed).to(form.dtype)
        right = torch.allclose(found[0].float(), rms_norm(total, norm, EPS).float(), NORM_ERROR, 0.0)
        return right and found[1].equal(total) and not self._rows.late.item()

    def _results(self, rank: int, nth: int, rows: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a rank's results of experts, as a model's are: those routed to, their weights, the shared one's."""
        form, shape = self._form, (rows, self._form.experts)
        routed = self._numbers(rank, 3 * nth, 5, math.prod(shape), form.width).to(form.dtype)
        weights = self._numbers(rank, 3 * nth + 1, 3, *shape).float() / 2 + 1
        shared = self._numbers(rank, 3 * nth + 2, 5, parts, rows, form.width)
        return routed, weights, shared.to(form.dtype if parts == 1 else torch.float32)

    def _sum(self, routed: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
        """Return what a rank says of its results: [N, H], float32. The sums are exact in any order."""
        weighed = weights.unsqueeze(-1) * routed.view(*weights.shape, -1)
        return (weighed.sum(1) + shared.sum(0)).to(self._form.dtype).float()

    def _numbers(self, rank: int, nth: int, count: int, *shape: int) -> Tensor:
        """Return integers around 0, of so many values: the same for all ranks, whatever their cards."""
        index = torch.arange(math.prod(shape), device=self._rows.late.device) + (97 * nth + rank) * 1_000_003
        return ((index * 2_654_435_761 >> 20) % count - count // 2).view(shape)


def allocate(size: int, device: torch.device) -> Tensor:
    """Allocate memory that other ranks may write to. Waits for none of them."""
    from torch.distributed._symmetric_memory import _SymmetricMemory  # private: may be gone, or take something else

    length, name = sum(used_bytes(size, *use) for use in USES), dist.group.WORLD.group_name
    memory: Tensor = _SymmetricMemory.empty_strided_p2p((length,), [1], torch.uint8, device, name)
    memory.zero_()
    torch.cuda.synchronize(device)  # before any other rank writes to it
    return memory


def join(rank: int, memory: Tensor, form: Form) -> Direct:
    """Let all ranks write to each other's memory, once all are here. Have the kernels compiled."""
    from torch.distributed._symmetric_memory import _SymmetricMemory  # private, as above

    addresses = _SymmetricMemory.rendezvous(memory).buffer_ptrs
    direct = Direct(*divided(rank, addresses, memory, USES), form)
    direct.prepare()
    torch.cuda.synchronize(memory.device)
    return direct


def divided(rank: int, addresses: list[int], memory: Tensor, uses: tuple[Use, Use]) -> tuple[PeerMemory, PeerMemory]:
    """Return a rank's views of memory for two uses, one behind the other.

    Args:
        addresses: of all ranks' memory.
        memory: this rank's.
    """
    device, size, start = memory.device, len(addresses), 0
    views = []
    for room, programs in uses:
        flags = torch.tensor(addresses, dtype=torch.int64, device=device) + start
        counts = torch.zeros(programs, dtype=torch.int64, device=device)
        late = torch.zeros(1, dtype=torch.int32, device=device)
        views.append(PeerMemory(rank, room, flags + _flag_bytes(size, programs), flags, counts, late, memory))
        start += used_bytes(size, room, programs)
    return views[0], views[1]


def used_bytes(size: int, room: int, programs: int) -> int:
    """Bytes of a rank's memory for one use."""
    return _flag_bytes(size, programs) + 2 * size * room


def _flag_bytes(size: int, programs: int) -> int:
    return ceil_div(8 * programs * size, _ALIGNMENT) * _ALIGNMENT


def connect(rank: int, size: int, device: torch.device, form: Form, least: Callable[[int], int]) -> Direct | None:
    """Return the direct exchange if it works for all ranks. All must call this. Flags are written by atomic operations,
    which not every link carries: then nothing arrives in the trial.

    What fails on one rank alone the others are told before they wait for it, but within `join`, which waits itself.

    Args:
        least: returns the least of all ranks' numbers.
    """
    if not least(int(reaches(rank, size))):
        return None
    memory = attempt("no memory for the other cards", lambda: allocate(size, device))
    if not least(int(memory is not None)):
        return None
    assert memory is not None
    shared = memory
    direct = attempt("the cards do not share memory", lambda: join(rank, shared, form))
    if not least(int(direct is not None)):
        return None
    assert direct is not None
    if not least(int(bool(attempt("the trial failed", direct.gathers)))):
        _log.warning("cards exchange by NCCL: what one writes to another's memory does not arrive")
        return None
    if not least(int(bool(attempt("the trial of few rows failed", direct.adds)))):
        _log.warning("few rows are not exchanged in the launch that computes them: its results are wrong here")
        direct.rows = None
    return direct


def reaches(rank: int, size: int) -> bool:
    """Return True if this rank's card may use the memory of all others."""
    return all(torch.cuda.can_device_access_peer(rank, other) for other in range(size) if other != rank)


def attempt(failure: str, act: Callable[[], T]) -> T | None:
    """Return what `act` returns, if it can."""
    try:
        return act()
    except Exception as error:  # interfaces of torch that may change raise anything
        _log.warning("cards exchange by NCCL, at least in part: %s", failure, extra={"reason": repr(error)})
        return None
