"""The forward pass that the demo is trained with, against transformers' own, sample by sample."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Model, hf_config, hf_inputs

from benchmarks.demo_model import corpus
from benchmarks.demo_model.batches import collate
from benchmarks.demo_model.config import hub_config
from benchmarks.demo_model.model import answer_logits, build
from benchmarks.demo_model.prompt import Encoded, Encoder
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD
from services.mm_encoder.vision.normalise import normalise


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(Path(__file__).parents[2] / "cli" / "demo_checkpoint")


def small_config() -> dict[str, object]:
    config = hub_config()
    return config | {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "freq_allocation": 2,
        "num_attention_heads": 4,
    }


def test_batched_logits_are_transformers(encoder: Encoder) -> None:
    rng = random.Random(3)
    kinds = ("scenes", "words", "pairs", "videos", "videos", "tools", "facts", "instructions")
    group = [encoder.encode(corpus.sample(rng, (112, 84), held_out=False, only=kind)) for kind in kinds]
    group.sort(key=lambda each: len(each.ids))
    trained = build(small_config(), seed=0).eval()
    scatter(trained)
    judge = Model._from_config(hf_config(small_config())).float().eval()
    judge.load_state_dict(trained.state_dict())
    batch = collate(group, encoder.patch_id)
    with torch.no_grad():
        logits = answer_logits(trained, batch)
    for i, each in enumerate(group):
        ours = logits[batch["owners"] == i]
        with torch.no_grad():
            theirs = judge(**judged_inputs(judge, each)).logits[0, each.answer_at - 1 : -1]
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def scatter(model: torch.nn.Module) -> None:
    """Weights wide enough that experts and logits vary."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "bias" in name:
                tensor.normal_(0, 0.1)
            elif tensor.ndim > 1:
                tensor.normal_(0, 0.12)


def judged_inputs(judge: torch.nn.Module, each: Encoded) -> dict[str, object]:
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    items: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {False: [], True: []}
    for media in each.media:
        rows = normalise(torch.from_numpy(media.rows), mean, std, torch.float32)
        items[media.grid[0] > 1].append((rows, torch.tensor(media.grid)))
    given = {
        name: (torch.cat([rows for rows, _ in found]), torch.stack([grid for _, grid in found]))
        for name, found in (("images", items[False]), ("videos", items[True]))
        if found
    }
    return hf_inputs(judge, each.ids.tolist(), **given)


def test_splits_are_apart(encoder: Encoder) -> None:
    rng = random.Random(5)
    for only in corpus.GENERATORS:
        assert corpus.sample(rng, (112, 112), held_out=True, only=only).held_out
        assert not corpus.sample(rng, (112, 112), held_out=False, only=only).held_out


def test_a_step_is_a_function_of_its_seed(encoder: Encoder) -> None:
    first, again = (corpus.sample(random.Random(7), (112, 112), held_out=False, only="pairs") for _ in range(2))
    assert first.answer == again.answer
    assert np.array_equal(encoder.encode(first).media[1].rows, encoder.encode(again).media[1].rows)
