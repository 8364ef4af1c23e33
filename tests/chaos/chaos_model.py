"""The demo checkpoint in float32, taught to finish any tool call it begins.

Random weights practically never write a tool call. Here the tokens of one are a chain: each one's embedding is so large
that the layers change nothing about it, and the head's row of the next token points the same way. So whatever made the
model write `<tool_call>` (a logit bias, for those who want one), the rest of the call follows, and then the end.
All other tokens are the demo's, and depend on all before them.
"""

import json
from itertools import pairwise
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from cli.demo import write_demo

TOOL_CALL = "<tool_call>"
# No token comes twice; a byte's token and a piece of the same text are two.
CALL = (
    *(TOOL_CALL, '{"', "name", '":', ' "', "get", "_", "weather", '",', '"', "arguments", "<0x22>", ":", " {", "}"),
    *("<0x7D>", "</tool_call>", "</s>"),
)
EMBEDDING_NORM = 1000.0  # the layers' outputs together are about 10
HEAD_NORM = 2.0  # makes a logit of about 22 where the demo's are below 8


def write_model(directory: Path) -> int:
    """Write the checkpoint to a new directory; the id of the token that begins a tool call.

    In float32: what a request is batched with, and whether it was resumed, then changes no token that does not hang on
    the order of sums (near_ties.py).
    """
    assert not directory.exists()
    write_demo(directory, dtype="float32")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    chain = [_id(pieces, text) for text in CALL]
    assert len(set(chain)) == len(chain)
    weight_map = json.loads((directory / "model.safetensors.index.json").read_bytes())["weight_map"]
    shards = {name: load_file(directory / name) for name in set(weight_map.values())}
    embedding = shards[weight_map["model.embed_tokens.weight"]]["model.embed_tokens.weight"]
    # Another seed than the demo's, whose own rows these would be.
    random = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn((len(chain), embedding.shape[1]), generator=random))
    head = embedding.clone()
    for (token, following), direction in zip(pairwise(chain), directions, strict=False):
        embedding[token] = EMBEDDING_NORM * direction
        head[following] = HEAD_NORM * direction
    shards[weight_map["lm_head.weight"]]["lm_head.weight"].copy_(head)
    shards[weight_map["model.norm.weight"]]["model.norm.weight"].fill_(1.0)
    for name, shard in shards.items():
        save_file(shard, directory / name, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return chain[0]


def _id(pieces: sentencepiece.SentencePieceProcessor, text: str) -> int:
    found: int = pieces.piece_to_id(text.replace(" ", "\u2581"))
    assert found != pieces.unk_id(), text
    return found
