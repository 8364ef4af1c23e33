"""Two ranks on one card, a stream each: the exchange by peer memory as kernels of a GPU, launched and captured.

The memory of both is the card's own. What this cannot show is the order of writes across a link: benchmarks.ranks does.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from services.engine.kernels.triton.dense.linear import MOST_SPLITS
from services.engine.kernels.triton.dense.rms_norm import add_norm
from services.engine.kernels.triton.exchange.add_norm import exchange_add_norm
from services.engine.kernels.triton.exchange.push import BLOCK_BYTES
from services.engine.kernels.triton.moe.moe import sum_experts
from services.engine.ranks import direct
from services.engine.ranks.direct import LOOKS, Direct, Form

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="two streams of a card")

RANKS, WIDTH, EXPERTS, EPS = 2, 2560, 6, 1e-5
FORM = Form(torch.bfloat16, WIDTH, EXPERTS)
# Few enough programs for those of both ranks to run at once: one that waits keeps its place on the card.
ROWS = 32
ROOM = ROWS * WIDTH * 2
USES = (ROOM, ROOM // BLOCK_BYTES), (ROOM, ROWS)


def ends(size: int = RANKS) -> list[Direct]:
    """The ranks' ends, with their kernels compiled."""
    length = sum(direct.used_bytes(size, *use) for use in USES)
    memory = torch.zeros(size, length, dtype=torch.uint8, device="cuda")
    addresses = [of.data_ptr() for of in memory]
    found = [Direct(*direct.divided(rank, addresses, memory[rank], USES), FORM) for rank in range(size)]
    for end in found:
        end.prepare()
    torch.cuda.synchronize()
    return found


class Block:
    """What the ranks know before the end of a block of experts, and what they should find."""

    def __init__(self, rows: int, parts: int) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        # Each of a place of its own, as ranks have them: what begins at another multiple of bytes has kernels compiled.
        self.results = [
            (
                empty(rows * EXPERTS, WIDTH),
                empty(rows, EXPERTS, dtype=torch.float32),
                empty(parts, rows, WIDTH, dtype=torch.bfloat16 if parts == 1 else torch.float32),
            )
            for _ in range(RANKS)
        ]
        self.residual, self.norm = empty(rows, WIDTH), empty(WIDTH)
        self.draw()

    def draw(self) -> None:
        """Draw new numbers, in place."""
        for tensor in (*chain(*self.results), self.residual, self.norm):
            tensor.normal_()

    def rows(self, count: int) -> list[Tensor]:
        """So many rows of each rank."""
        return [routed[:count] for routed, _, _ in self.results]

    def expected(self) -> tuple[Tensor, Tensor]:
        """Both results, by the launches that one rank needs for each."""
        sums = [sum_experts(*results, torch.bfloat16) for results in self.results]
        return add_norm(torch.stack(sums), self.residual, self.norm, EPS)

    def end(self, rank: int, at: Direct) -> tuple[Tensor, Tensor]:
        """Both results on one rank."""
        assert at.rows is not None
        return exchange_add_norm(*self.results[rank], self.residual, self.norm, EPS, at.rows, LOOKS)


def streams() -> list[torch.cuda.Stream]:
    """A stream for each rank, in which neither memory nor a kernel of torch's has to be made ready: that waits for all
    kernels of the card, and so for those that wait for the other rank."""
    found = [torch.cuda.Stream() for _ in range(RANKS)]  # type: ignore[no-untyped-call]
    for stream in found:
        with torch.cuda.stream(stream):
            (alone,) = ends(1)
            assert alone.gathers()
            assert alone.adds()
    return found


def on_time(both: list[Direct]) -> bool:
    return not any(peers.late.item() for end in both for peers in (end._parts, end._rows))


def test_both_ranks_find_that_the_exchange_works() -> None:
    def tries(end: Direct, stream: torch.cuda.Stream) -> bool:
        with torch.cuda.stream(stream):
            return end.gathers() and end.adds()

    with ThreadPoolExecutor(RANKS) as at_once:
        assert list(at_once.map(tries, ends(), streams())) == [True] * RANKS


@pytest.mark.parametrize("parts", range(1, MOST_SPLITS + 1))
def test_the_end_of_a_block_is_that_of_separate_launches(parts: int) -> None:
    both, own_streams = ends(), streams()
    for rows in (1, 2, 7, 16, ROWS) * 20:
        block = Block(rows, parts)
        torch.cuda.synchronize()
        found = []
        for rank, (end, stream) in enumerate(zip(both, own_streams, strict=True)):
            with torch.cuda.stream(stream):
                found.append((*block.end(rank, end), end.gather(block.rows(rows)[rank], LOOKS)))
        torch.cuda.synchronize()
        for of_rank in found:
            assert all(map(torch.equal, of_rank, (*block.expected(), torch.stack(block.rows(rows)))))
    assert on_time(both)


def test_captured_steps_exchange_anew_at_each_replay() -> None:
    both, own_streams, graphs = ends(), streams(), list[torch.cuda.CUDAGraph]()
    blocks = [Block(rows, parts) for rows, parts in ((ROWS, 1), (1, 2), (16, 4), (5, 1))] * 7
    found = list[list[tuple[Tensor, ...]]]()
    torch.cuda.synchronize()
    for rank, (end, stream) in enumerate(zip(both, own_streams, strict=True)):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            found.append([(*block.end(rank, end), end.gather(block.residual + rank, LOOKS)) for block in blocks])
    for _ in range(20):
        for block in blocks:
            block.draw()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, own_streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for of_rank in found:
            for block, results in zip(blocks, of_rank, strict=True):
                parts = torch.stack([block.residual + rank for rank in range(RANKS)])
                assert all(map(torch.equal, results, (*block.expected(), parts)))
    assert on_time(both)
