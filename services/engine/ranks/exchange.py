"""Exchange between the ranks: by gloo over loopback on CPUs, by NCCL on GPUs, where steps that are captured contain it.

Every rank gets the parts of all and adds them itself, in the order of ranks. Of two ranks that moves no more bytes than
a sum on the way would; of four it does, so many rows are summed by NCCL, whose order depends on where in the message a
row is, unless sums must not depend on it.

Cards that reach each other's memory exchange by a kernel of ours (`services.engine.ranks.direct`), which is faster than
NCCL: at the start all ranks try it, and use it if it works for all.
"""

import socket
import sys
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from services.engine.kernels.peer_memory import PeerMemory
from shared.errors import ConfigError
from shared.log import logger
from shared.model.config import ModelConfig

# A rank waits for the others as long as it takes: the watchdogs know what is too long.
FOREVER = timedelta(days=30)
MEETING_S = 600.0  # until all processes have started; libraries may have to be read from a slow disk
SUMMED_BYTES = 1 << 20  # of a part, from which on NCCL sums those of more than two ranks
ADVICE = "NCCL_P2P_DISABLE=1 in the environment has ranks go around links between cards that do not work"
_log = logger(__name__)
_SAID = 1 << 16  # numbers that each rank says to try the link
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
# Multicast over NVLink is left off: not every host lets processes use it, and some hang.
SAFE = {
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    # Errors and silence are for our own watchdogs; torch's would look into a capture.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


# Named so from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shortcut(Protocol):
    """Faster way to the parts of all ranks."""

    rows: PeerMemory | None  # by which kernels exchange few rows

    def gather(self, own: Tensor) -> Tensor:
        """See `Exchange.gather`."""


def make_safe(environ: MutableMapping[str, str]) -> None:
    """Set what the libraries read when they start, unless `environ` says otherwise."""
    for name, value in SAFE.items():
        environ.setdefault(name, value)


def rank_device(where: str, rank: int) -> torch.device:
    """Return a rank's device, and let this thread compute on it."""
    if where != "cuda":
        return torch.device(where)
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def listen() -> socket.socket:
    """Return a socket at which the ranks may meet, on loopback alone."""
    meeting = socket.socket()
    meeting.bind(("127.0.0.1", 0))
    meeting.listen()
    return meeting


class Exchange:
    """One rank's end. All ranks must call the same methods, with tensors of the same shapes, in the same order."""

    def __init__(
        self,
        rank: int,
        size: int,
        meeting: int | socket.socket,
        device: torch.device,
        ended: Callable[[], None],
        *,
        invariant: bool = False,
    ) -> None:
        """Meet the other ranks, and wait until all are there.

        Args:
            meeting: the socket to meet at, of rank 0; the others name its port.
            device: where the tensors are.
            ended: called when an exchange that the host waits for has ended.
            invariant: a row's sums must not depend on the other rows.
        """
        self._rank, self._size = rank, size
        self._ended = ended
        self._sums = size > 2 and not invariant
        hosts = isinstance(meeting, socket.socket)
        port = meeting.getsockname()[1] if isinstance(meeting, socket.socket) else meeting
        store = dist.TCPStore(
            "127.0.0.1",
            port,
            size,
            is_master=hosts,
            timeout=timedelta(seconds=MEETING_S),
            wait_for_workers=False,
            master_listen_fd=meeting.detach() if isinstance(meeting, socket.socket) else None,
        )
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=FOREVER)
        self._device = device
        self._shortcut: Shortcut | None = None

    def check(self, environ: Mapping[str, str], config: ModelConfig) -> None:
        """Try the link: what the ranks say must arrive as it was said. Choose the way for what follows. May hang where
        cards cannot reach each other.

        Args:
            environ: ours; NCCL_P2P_DISABLE is about our own use of the links, too.
            config: of the model, whose kernels are tried.

        Raises:
            ConfigError: it does not.
        """
        said = torch.arange(self._size * _SAID, dtype=torch.float32, device=self._device).view(self._size, 1, _SAID)
        if not torch.equal(self.gather(said[self._rank].clone()), said):
            raise ConfigError(f"what a rank says does not arrive at another as it was said; {ADVICE}")
        if self._device.type == "cuda":
            from services.engine.ranks.direct import Form, connect  # Triton exists for Linux only

            disabled = environ.get("NCCL_P2P_DISABLE", "0") != "0"
            if not disabled:
                self._shortcut = connect(self._rank, self._size, self._device, Form.of(config), self.least)
            _log.info("ranks exchange by %s", "NCCL" if self._shortcut is None else "writing to each other's memory")

    @property
    def peer_memory(self) -> PeerMemory | None:
        """Memory by which kernels exchange few rows; None if they cannot."""
        return None if self._shortcut is None else self._shortcut.rows

    def gather(self, own: Tensor) -> Tensor:
        """Return [parts, N, H] whose sum over the first dimension is that of all ranks' [N, H]."""
        if self._sums and own.is_cuda and own.nbytes >= SUMMED_BYTES:
            dist.all_reduce(own)
            return own.unsqueeze(0)
        if self._shortcut is not None:
            parts = self._shortcut.gather(own.contiguous())
        else:
            parts = own.new_empty(self._size, *own.shape)
            _all_gather(parts.view(-1, *own.shape[1:]), own.contiguous())
        self._ended()
        return parts

    def least(self, number: int) -> int:
        """Return the least of all ranks' numbers."""
        least = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least.item())

    def close(self) -> None:
        """Leave the others. NCCL's end is the process's: it may wait for ranks that have gone."""
        if self._device.type == "cpu":
            dist.destroy_process_group()
