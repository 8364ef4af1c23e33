"""Exchange through memory that all ranks write to: here between processes that share it; and when it is used."""

import multiprocessing
from collections.abc import Callable

import pytest
import torch
from split_block import HIDDEN, INPUTS, OUT, block, draw, half, moe
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.peer_memory import PeerMemory
from services.engine.kernels.triton import parallel
from services.engine.kernels.triton.dense.rms_norm import add_norm
from services.engine.kernels.triton.exchange.add_norm import exchange_add_norm
from services.engine.kernels.triton.exchange.blocks import FOREVER
from services.engine.kernels.triton.exchange.push import BLOCK_BYTES
from services.engine.kernels.triton.moe.moe import sum_experts
from services.engine.kernels.triton.ops import gpu_ops
from services.engine.ranks import direct
from services.engine.ranks.direct import Direct, connect
from services.engine.ranks.exchange import Exchange, listen

RANKS, PROGRAMS, WIDTH, EXPERTS, CPU = 2, 4, 1536, 2, torch.device("cpu")
ROOM = PROGRAMS * BLOCK_BYTES
ROWS = (1, 3, 1, 12)  # the last, of 3,072 bytes each, are exchanged in pieces
PATIENCE_S = 120.0
alone = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's memory; benchmarks.ranks has two cards")


def memory_of(size: int) -> Tensor:
    """Memory of all ranks, for two exchanges."""
    return share(torch.zeros(size, 2, PROGRAMS * size * 8 + 2 * size * ROOM, dtype=torch.uint8))


def share(tensor: Tensor) -> Tensor:
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def end_of(rank: int, memory: Tensor) -> Direct:
    def peers(nth: int) -> PeerMemory:
        flags = torch.tensor([rows[nth].data_ptr() for rows in memory])
        counts, late = torch.zeros(PROGRAMS, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        return PeerMemory(rank, ROOM, flags + PROGRAMS * len(memory) * 8, flags, counts, late, memory)

    return Direct(peers(0), peers(1))


def exchange(rank: int, memory: Tensor, right: Tensor) -> None:
    """Be one of the ranks; count what is as it should be. All draw the same numbers."""
    end, generator = end_of(rank, memory[0]), torch.Generator().manual_seed(0)
    assert end.rows is not None

    def drawn(*shape: int) -> Tensor:
        return torch.randn(RANKS, *shape, generator=generator).bfloat16()

    for rows in ROWS:
        parts = drawn(rows, WIDTH)
        right[rank] += torch.equal(end.gather(parts[rank]), parts)
        if rows <= PROGRAMS:
            routed, shared, weights = drawn(rows * EXPERTS, WIDTH), drawn(1, rows, WIDTH), drawn(rows, EXPERTS).float()
            residual, norm = drawn(rows, WIDTH)[0], drawn(WIDTH)[0]
            results = list(zip(routed, weights, shared, strict=True))
            expected = add_norm(torch.stack([sum_experts(*of, norm.dtype) for of in results]), residual, norm, 1e-5)
            found = exchange_add_norm(*results[rank], residual, norm, 1e-5, end.rows)
            right[rank] += all(map(torch.equal, found, expected))
    right[rank] += end.gathers() and end.adds()
    right[rank] += blocks_agree(end_of(rank, memory[1]), rank)


def blocks_agree(end: Direct, rank: int) -> bool:
    """Return True if blocks of experts, whose rows go each way, are as one rank computes them."""
    ops = parallel.parallel_ops(gpu_ops(), end.gather, peer_memory=end.rows)
    agree = True
    for rows in (PROGRAMS, PROGRAMS + 1):
        x, residual = draw(rows, INPUTS, seed=12), draw(rows, HIDDEN, seed=13)
        own = x.chunk(RANKS, -1)[rank], OUT.chunk(RANKS, -1)[rank].contiguous()
        found = block(ops, *own, residual, moe(lambda *weights: half(rank, *weights)), None)
        expected = block(Ops(), x, OUT, residual, moe(lambda *weights: weights), None)
        agree &= all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(found, expected, strict=True))
    return agree


@alone
@pytest.mark.system
def test_what_all_ranks_write_arrives() -> None:
    memory = share(torch.stack([memory_of(RANKS)] * 2))
    right = share(torch.zeros(RANKS, dtype=torch.int64))
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=exchange, args=(rank, memory, right), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE_S)
        process.kill()
    assert right.tolist() == [len(ROWS) + sum(rows <= PROGRAMS for rows in ROWS) + 2] * RANKS


@alone
def test_a_trial_does_not_wait_for_a_rank_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "LOOKS", 32)
    end = end_of(0, memory_of(2))
    end.prepare()
    assert not end.gathers()
    assert not end.adds()


class Found(Direct):
    """Exchange of which is known what works."""

    def __init__(self, gathers: bool = True, adds: bool = True) -> None:
        none = torch.empty(0)
        super().__init__(*[PeerMemory(0, 0, none, none, none, none, none)] * 2)
        self._works = gathers, adds

    def gather(self, own: Tensor, limit: int = FOREVER) -> Tensor:
        return torch.full_like(own, 7.0).unsqueeze(0)

    def gathers(self) -> bool:
        return self._works[0]

    def adds(self) -> bool:
        return self._works[1]


def choose(make: Callable[[], Direct], others: str = "1111") -> Direct | None:
    """Return what is chosen where another rank says so, question by question."""
    said = iter(others)
    return connect(0, 2, CPU, lambda ours: min(ours, int(next(said))), lambda *_: make())


def fail() -> Direct:
    raise RuntimeError("no such memory")


def not_called() -> Direct:
    raise AssertionError("tried")


def test_memory_of_the_other_cards_is_used_if_all_ranks_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda rank, other: True)
    chosen = choose(Found)
    assert chosen is not None
    assert chosen.rows is not None
    assert choose(fail) is None
    assert choose(lambda: Found(gathers=False)) is None
    for others in ("0", "10", "110"):  # another cannot
        assert choose(Found, others) is None
    for partly in (choose(lambda: Found(adds=False)), choose(Found, "1110")):
        assert partly is not None
        assert partly.rows is None


def test_cards_that_do_not_reach_each_other_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda rank, other: False)
    assert choose(not_called, "1") is None


def test_an_exchange_takes_the_shortcut_that_it_has() -> None:
    ended, part = list[None](), torch.ones(2, 3)
    exchange = Exchange(0, 1, listen(), CPU, lambda: ended.append(None))
    try:
        exchange.check({})
        assert exchange.peer_memory is None
        tried = len(ended)
        assert exchange.gather(part).equal(part.unsqueeze(0))
        found = exchange._shortcut = Found()
        assert exchange.peer_memory is found.rows
        assert exchange.gather(part).equal(torch.full((1, 2, 3), 7.0))
        assert len(ended) == tried + 2, "both are signs of life"
    finally:
        exchange.close()
