"""A tokenizer of any size in which every id but the control tokens is a word, so that no token is free to detokenize.

Random weights speak all of a vocabulary. With a tokenizer smaller than that a postproc would find most tokens to be
nothing, and have nothing to send.
"""

import json
from pathlib import Path

CONTROL = (
    *("<unk>", "<s>", "</s>", "</think>", "<think>", "<|begin_of_sentence|>", "<|end_of_sentence|>"),
    *("<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
)  # ids from 0
SYLLABLES = tuple(first + second for first in "bdfghjklmnprstvz" for second in "aeiou")


def write_tokenizer(directory: Path, size: int) -> None:
    """tokenizer.json of `size` ids for `shared.model.tokenizer`: controls, bytes, and words of a few letters."""
    pieces = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = (_word(number) for number in range(size - len(pieces)))
    vocab = {text: i for i, text in enumerate([*pieces, *words])}
    added = [{"content": text, "special": True, "id": i, **_PLAIN} for i, text in enumerate(CONTROL)]
    model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": True}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}), encoding="utf-8")


_PLAIN = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)


def _word(number: int) -> str:
    """Words that begin with a space and differ: the number's digits in syllables, the last first."""
    word = "▁"
    while True:
        number, digit = divmod(number, len(SYLLABLES))
        word += SYLLABLES[digit]
        if not number:
            return word
