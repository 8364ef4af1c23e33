"""Experts that the tokens of a prompt visit where weights are drawn (`--load-format dummy`)."""

import msgspec
import pytest
import torch
from engine_cases import CONFIG
from small_model import Recomputed

from benchmarks.routing import expert_loads, spread
from services.engine.kernels.ops import Ops
from services.engine.kernels.reference import moe
from services.engine.model.ernie import ErnieModel
from services.engine.model.inputs import KVCache
from services.engine.model.weights import load_weights
from services.engine.run.pieces import StepPieces
from services.engine.run.rehearsal import Rehearsal
from shared.model.drawn_weights import ATTENTION_STD, STD, DrawnWeights

CPU = torch.device("cpu")
TOKENS, PAGE, EXPERTS, TOP_K, HEADS, DIM = 512, 16, 16, 2, 8, 32
DRAWN = msgspec.structs.replace(
    CONFIG,
    vocab_size=4096,
    image_patch_id=4096,
    hidden_size=HEADS * DIM,
    intermediate_size=2 * HEADS * DIM,
    num_layers=4,
    num_heads=HEADS,
    num_kv_heads=2,
    head_dim=DIM,
    time_freqs=4,
    num_experts=EXPERTS,
    experts_per_token=TOP_K,
    text_expert_size=256,
    vision_expert_size=16,
    shared_expert_size=256,
)


def routing(attention_std: float) -> dict[str, float]:
    """Return how evenly one prompt of invented tokens visits the experts."""
    weights = load_weights(DrawnWeights(CPU, attention_std=attention_std), DRAWN, torch.float32, CPU, None)
    model = ErnieModel(DRAWN, weights, Ops())
    cache = KVCache.allocate(DRAWN.num_layers, TOKENS // PAGE + 1, PAGE, 2, DIM, torch.float32, "cpu")
    pieces = StepPieces(model, cache, torch.zeros(1), TOKENS // PAGE, 0, DRAWN.image_patch_id, Recomputed())
    step = Rehearsal(model, cache, pieces, DRAWN, 1).step([(TOKENS, TOKENS)]).to(CPU, PAGE)
    loads = expert_loads(lambda: model.hidden(step, cache), moe, EXPERTS)
    assert [rows.sum() for rows in loads] == [TOKENS * TOP_K] * (DRAWN.num_layers - 1)
    return spread(loads)


def test_the_tokens_of_a_prompt_spread_over_all_experts() -> None:
    """Choices at random have a deviation of 0.12: sqrt(16 / 1024)."""
    assert routing(ATTENTION_STD)["deviation"] < 0.3


def test_attention_drawn_as_the_other_weights_makes_tokens_choose_alike() -> None:
    found = routing(STD)
    assert found["deviation"] > 0.9
    assert found["most"] > 3


def test_only_what_attention_returns_is_drawn_smaller() -> None:
    drawn = DrawnWeights(CPU)
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    *others, out = (float(drawn.get(name, (256, 256)).std()) for name in names)
    assert others == pytest.approx([STD] * 3, rel=0.02)
    assert out == pytest.approx(ATTENTION_STD, rel=0.02)
