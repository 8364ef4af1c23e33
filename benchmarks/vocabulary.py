"""Tokenizer of any size in which every id but the control tokens is a word, so that each token costs detokenizing.

Random weights generate every id of the vocabulary. With a tokenizer smaller than that, most tokens would have no text,
and postproc nothing to send.
"""

import json
from pathlib import Path

CONTROL = (
    *("<unk>", "<s>", "</s>", "</think>", "<think>", "<|begin_of_sentence|>", "<|end_of_sentence|>"),
    *("<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
)  # ids from 0
SYLLABLES = tuple(first + second for first in "bdfghjklmnprstvz" for second in "aeiou")


def write_tokenizer(directory: Path, size: int) -> None:
    """Write a tokenizer.json of `size` ids: control tokens, bytes, and words of a few letters."""
    pieces = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = (_word(number) for number in range(size - len(pieces)))
    vocab = {text: i for i, text in enumerate([*pieces, *words])}
    added = [{"content": text, "special": True, "id": i, **_PLAIN} for i, text in enumerate(CONTROL)]
    model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": True}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}), encoding="utf-8")


_PLAIN = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)


def _word(number: int) -> str:
    """Return a word with a leading space for a number: its digits as syllables, the last first."""
    word = "▁"
    while True:
        number, digit = divmod(number, len(SYLLABLES))
        word += SYLLABLES[digit]
        if not number:
            return word
