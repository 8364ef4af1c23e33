"""Exchange through memory that all ranks write to: here between processes that share it; and when it is used."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
import torch
from engine_cases import CONFIG
from split_block import HIDDEN, INPUTS, OUT, block, draw, half, moe
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from services.engine.kernels.ops import Ops
from services.engine.kernels.peer_memory import PeerMemory
from services.engine.kernels.triton import parallel
from services.engine.kernels.triton.dense.linear import MOST_SPLITS
from services.engine.kernels.triton.dense.rms_norm import add_norm
from services.engine.kernels.triton.exchange.add_norm import exchange_add_norm
from services.engine.kernels.triton.exchange.blocks import FOREVER
from services.engine.kernels.triton.exchange.push import BLOCK_BYTES
from services.engine.kernels.triton.moe.moe import sum_experts
from services.engine.kernels.triton.ops import gpu_ops
from services.engine.ranks import direct
from services.engine.ranks.direct import Direct, Form, connect
from services.engine.ranks.exchange import Exchange, listen

RANKS, PROGRAMS, WIDTH, EXPERTS, CPU = 2, 4, 1536, 2, torch.device("cpu")
ROOM, FORM = PROGRAMS * BLOCK_BYTES, Form(torch.bfloat16, WIDTH, EXPERTS)
USES = ((ROOM, PROGRAMS),) * 2
ROWS = (1, 3, 1, 12)  # the last, of 3,072 bytes each, are exchanged in pieces
PATIENCE_S = 120.0
alone = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's memory; benchmarks.ranks has two cards")


def memory_of(size: int) -> Tensor:
    """Memory of all ranks, for two exchanges."""
    return share(torch.zeros(size, sum(direct.used_bytes(size, *use) for use in USES), dtype=torch.uint8))


def share(tensor: Tensor) -> Tensor:
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def end_of(rank: int, memory: Tensor) -> Direct:
    addresses = [of.data_ptr() for of in memory]
    return Direct(*direct.divided(rank, addresses, memory[rank], USES), FORM)


def exchange(rank: int, memory: Tensor, right: Tensor, prepared: Barrier) -> None:
    """Be one of the ranks; count what is as it should be. All draw the same numbers."""
    end, generator = end_of(rank, memory[0]), torch.Generator().manual_seed(0)
    assert end.rows is not None
    end.prepare()
    prepared.wait(PATIENCE_S)

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
    told = memory, right, context.Barrier(RANKS)
    ranks = [context.Process(target=exchange, args=(rank, *told), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE_S)
        process.kill()
    assert right.tolist() == [len(ROWS) + sum(rows <= PROGRAMS for rows in ROWS) + 2] * RANKS


@alone
def test_a_trial_waits_once_for_a_rank_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs and exchanges it is of."""
    atomic, looks = InterpreterBuilder.create_atomic_rmw, list[None]()

    def counted(*args: Any) -> Any:
        looks.append(None)
        return atomic(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", counted)
    monkeypatch.setattr(direct, "LOOKS", 64)
    end = end_of(0, memory_of(2))
    end.prepare()
    for tried in (lambda: end.gather(torch.ones(4, WIDTH).bfloat16(), 64), end.gathers, end.adds):
        looks.clear()
        for peers in (end._parts, end._rows):
            peers.late.zero_()
        tried()
        assert 64 < len(looks) < 2 * 64
    assert not end.gathers()
    assert not end.adds()


@alone
@pytest.mark.parametrize(("normed", "total"), [(0, 0), (1, 0), (0, 1)])
def test_a_trial_looks_at_both_results(monkeypatch: pytest.MonkeyPatch, normed: int, total: int) -> None:
    """One rank alone needs no other."""

    def spoiled(*args: Any) -> tuple[Tensor, Tensor]:
        found = exchange_add_norm(*args)
        if len(args[1]) == PROGRAMS and len(args[2]) == MOST_SPLITS:
            found[0][-1, -1] += normed
            found[1][-1, -1] += total
        return found

    monkeypatch.setattr(direct, "exchange_add_norm", spoiled)
    end = end_of(0, memory_of(1))
    assert end.gathers()
    assert end.adds() == (not normed and not total)


class Found(Direct):
    """Exchange of which is known what works."""

    def __init__(self, gathers: bool = True, adds: bool = True) -> None:
        none = torch.empty(0)
        memory = PeerMemory(0, 0, none, none, none, none, none)
        super().__init__(memory, memory, FORM)
        self._works = gathers, adds

    def gather(self, own: Tensor, limit: int = FOREVER) -> Tensor:
        return torch.full_like(own, 7.0).unsqueeze(0)

    def gathers(self) -> bool:
        return self._works[0]

    def adds(self) -> bool:
        return self._works[1]


class Cards:
    """Two cards, of which this one's rank allocates, joins and tries as it is told; what it has done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = ""
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda rank, other: True)
        self._set = monkeypatch.setattr

    def choose(self, others: str = "11111", fails: str = "", found: Direct | None = None) -> Direct | None:
        """Return what is chosen where another rank answers so, question by question, and a step here fails."""
        said, self.done = iter(others), ""

        def step(name: str, gives: object) -> Callable[..., Any]:
            def act(*_: object) -> object:
                self.done += name[0]
                if name == fails:
                    raise TypeError("no such memory")  # as of an interface that has changed
                return gives

            return act

        found = found or Found()
        for name, gives in (("gathers", found.gathers()), ("adds", found.adds())):
            self._set(found, name, step(name, gives))
        self._set(direct, "allocate", step("memory", torch.empty(0)))
        self._set(direct, "join", step("join", found))
        return connect(0, 2, CPU, FORM, lambda ours: min(ours, int(next(said))))


def test_memory_of_the_other_cards_is_used_if_all_ranks_can(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch)
    chosen = cards.choose()
    assert chosen is not None
    assert chosen.rows is not None
    assert cards.choose(found=Found(gathers=False)) is None
    for partly in (cards.choose(found=Found(adds=False)), cards.choose("11110"), cards.choose(fails="adds")):
        assert partly is not None
        assert partly.rows is None


def test_no_rank_waits_for_one_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch)
    for others, done in (("0", ""), ("10", "m"), ("110", "mj"), ("1110", "mjg")):
        assert cards.choose(others) is None
        assert cards.done == done, "nothing is done together after another rank's failure"
    for fails, done in (("memory", "m"), ("join", "mj"), ("gathers", "mjg")):
        assert cards.choose(fails=fails) is None
        assert cards.done == done


def test_cards_that_do_not_reach_each_other_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda rank, other: False)
    assert cards.choose() is None
    assert cards.done == ""


def test_an_exchange_takes_the_shortcut_that_it_has() -> None:
    ended, part = list[None](), torch.ones(2, 3)
    exchange = Exchange(0, 1, listen(), CPU, lambda: ended.append(None))
    try:
        exchange.check({}, CONFIG)
        assert exchange.peer_memory is None
        tried = len(ended)
        assert exchange.gather(part).equal(part.unsqueeze(0))
        found = exchange._shortcut = Found()
        assert exchange.peer_memory is found.rows
        assert exchange.gather(part).equal(torch.full((1, 2, 3), 7.0))
        assert len(ended) == tried + 2, "both are signs of life"
    finally:
        exchange.close()
