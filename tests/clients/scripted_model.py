"""A checkpoint whose greedy answer is known beforehand: each token of a script is followed by the next.

The layers add nothing (their output projections are zero), so the logits depend on the last token alone; the head's
row of a token is the embedding of the token it follows. Everything else is an ordinary checkpoint.
"""

import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from cli.demo import HIDDEN, write_demo
from cli.demo_tokenizer import CONTROL_PIECES, CORPUS, NUM_PIECES, USER_DEFINED_PIECES

# After the newline that ends every prompt. No piece comes twice; four bytes make one character.
SCRIPT = (
    *("The user", " asks for", " the weather", ". ", "<0xE2>", "<0x98>", "<0x82>", " So:", "</think>", "\n\n"),
    *("<tool_call>", "\n{", '"name": "get_', 'weather", ', '"arguments": {', '"city": "', "Par", "is", '"}', "}"),
    *("\n\n\n", "</tool_call>", "</s>"),
)
# A script without a call, for programs that would have to know the tool.
PLAIN_SCRIPT = (
    "The user",
    " asks for",
    " the weather",
    ".",
    "</think>",
    "\n\n",
    "It is",
    " fine",
    " today",
    ". ",
    "</s>",
)
PLAIN_ANSWER = "It is fine today. "
REASONING = "The user asks for the weather. \u2602 So:"
CONTENT_WITHOUT_TOOLS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n\n\n</tool_call>'
SILENT = (".self_attn.o_proj.weight", "down_proj.weight")  # what the layers would add


def write_scripted(directory: Path, script: Sequence[str] = SCRIPT) -> None:
    """Write the checkpoint, in the hub's form and in float32."""
    write_demo(directory, dtype="float32")
    tokenizer = _train_tokenizer(script)
    (directory / "tokenizer.model").write_bytes(tokenizer)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    chain = [_id(pieces, piece) for piece in ("<0x0A>", *script)]
    assert len(set(chain)) == len(chain)
    weight_map = json.loads((directory / "model.safetensors.index.json").read_bytes())["weight_map"]
    shards = {name: load_file(directory / name) for name in set(weight_map.values())}
    embedding = shards[weight_map["model.embed_tokens.weight"]]["model.embed_tokens.weight"]
    embedding.copy_(torch.nn.functional.normalize(torch.randn(embedding.shape, generator=torch.manual_seed(0))))
    head = torch.zeros_like(embedding)
    for token, following in pairwise(chain):
        head[following] = embedding[token]
    shards[weight_map["lm_head.weight"]]["lm_head.weight"].copy_(head * HIDDEN**0.5)
    for name, shard in shards.items():
        for tensor_name, tensor in shard.items():
            if tensor_name.startswith("model.layers.") and tensor_name.endswith(SILENT):
                tensor.zero_()
            if tensor_name == "model.norm.weight":
                tensor.fill_(1.0)
        save_file(shard, directory / name, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def _train_tokenizer(script: Sequence[str]) -> bytes:
    """The demo's, with the script's pieces among its own."""
    known = {*CONTROL_PIECES, *USER_DEFINED_PIECES, "</s>"}
    scripted = [_piece(text) for text in script if text not in known and not text.startswith("<0x")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=list(CONTROL_PIECES),
        user_defined_symbols=[*USER_DEFINED_PIECES, *scripted],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _piece(text: str) -> str:
    """SentencePiece writes a space as U+2581."""
    return text.replace(" ", "\u2581")


def _id(pieces: sentencepiece.SentencePieceProcessor, text: str) -> int:
    found: int = pieces.piece_to_id(_piece(text))
    assert found != pieces.unk_id(), text
    return found
