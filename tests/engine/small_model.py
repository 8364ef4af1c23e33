"""A small model of random weights behind the engine's own runner, sampler and decode buffers.

Its tokens are the vision experts' as often as not.
"""

from collections.abc import Callable, Sequence

import msgspec
import torch
from engine_cases import CONFIG, FACTS
from engine_loop import BLOCK
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.triton.ops import gpu_ops
from services.engine.model.ernie import ErnieModel
from services.engine.model.inputs import KVCache
from services.engine.model.weights import load_weights
from services.engine.run.assembly import sampling_ops
from services.engine.run.decode_rows import DecodeRows
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.pieces import GraphRecorder, Made, Replay, StepPieces
from services.engine.run.runner import ModelRunner
from services.engine.run.sampler import Sampler
from services.engine.run.step import StepBuilder

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BLOCKS, SEQS = 64, 5
LONGEST = 32  # blocks of one sequence
PAGE = 16 if ON_GPU else BLOCK  # a matrix instruction wants so many keys
SMALL = msgspec.structs.replace(
    CONFIG,
    hidden_size=64,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    text_expert_size=32,
    vision_expert_size=32,
    shared_expert_size=32,
    time_freqs=2,
)
SMALL_FACTS = msgspec.structs.replace(FACTS, model=SMALL)


class Drawn:
    """Stands in for a checkpoint: every tensor that is asked for exists."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(4)

    def get(self, name: str, shape: Sequence[int]) -> Tensor:
        values = torch.randn(shape, generator=self._generator)
        return (1 + 0.1 * values if "norm" in name else 0.3 * values).to(DEVICE)

    def integers(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        """Nothing is stored quantised."""

    def has(self, name: str) -> bool:
        return not name.startswith("lm_head")

    def check_all_used(self, prefixes: Sequence[str]) -> None:
        pass


class Computed(DecodeGraphs):
    """Graphs on a device that cannot capture."""

    def _capture(self, size: int) -> Callable[[], Tensor]:
        return lambda: self._forward(size)


class Recomputed:
    """Recorder for a device that cannot capture: computes again, into the same memory."""

    def record(self, compute: Callable[[], Made]) -> tuple[Made, Replay]:
        made = compute()

        def replay() -> None:
            for old, new in zip(made, compute(), strict=True):
                old.copy_(new)

        return made, replay


class StepByStep(ModelRunner):
    """Knows every token before it is told what is next."""

    overlaps = False


def small_model() -> ErnieModel:
    weights = load_weights(Drawn(), SMALL, torch.float32, DEVICE, None)
    return ErnieModel(SMALL, weights, gpu_ops() if ON_GPU else Ops())


def decode_rows(model: ErnieModel) -> DecodeRows:
    return DecodeRows(model, SEQS, LONGEST, PAGE, BLOCKS, SMALL.image_patch_id)


def runner(
    model: ErnieModel, kind: type[ModelRunner], captured: bool = True, piece_rows: int | None = 16
) -> ModelRunner:
    """Build a runner.

    Args:
        piece_rows: of the largest step in captured pieces; larger ones are padded alone. None: without pieces.
    """
    shape = SMALL.num_layers, BLOCKS + 1, PAGE, SMALL.num_kv_heads, SMALL.head_dim
    cache = KVCache.allocate(*shape, model.dtype, str(DEVICE))
    rows = decode_rows(model)
    graphs = (DecodeGraphs if ON_GPU else Computed)(model, cache, rows, SEQS) if captured else None
    pieces = None
    if captured and piece_rows is not None:
        recorder = GraphRecorder(DEVICE) if ON_GPU else Recomputed()
        pieces = StepPieces(model, cache, rows.last_tokens, BLOCKS, piece_rows, SMALL.image_patch_id, recorder)
    sampler = Sampler(SMALL.eos_ids, sampling_ops("base", ON_GPU), DEVICE)
    builder = StepBuilder(model, PAGE, SMALL.image_patch_id)
    return kind(model, cache, sampler, builder, GrammarMasks(SMALL.vocab_size, 1), graphs, SEQS, pieces)
