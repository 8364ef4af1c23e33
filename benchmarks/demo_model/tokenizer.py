"""Trains the demo's tokenizer on its own corpus: python -m benchmarks.demo_model.tokenizer DIRECTORY."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.demo_model import corpus
from benchmarks.demo_model.prompt import answer_text, prompt_text
from cli import demo_tokenizer
from cli.demo_tokenizer import ADDED_TOKENS, CONTROL_PIECES, USER_DEFINED_PIECES

NUM_PIECES = 2000
SAMPLES = 30_000
_ASCII = " ".join(chr(code) for code in range(33, 127))


def texts(samples: int) -> Iterator[str]:
    """Lines of the corpus without what every prompt has, and every printable character of ASCII."""
    rng = random.Random("tokenizer")
    for _ in range(samples):
        sample = corpus.sample(rng, (112, 112), held_out=False)
        text = prompt_text(sample) + answer_text(sample)
        for control in (*ADDED_TOKENS, *CONTROL_PIECES, *USER_DEFINED_PIECES):
            text = text.replace(control, "\n")
        yield from text.splitlines()
    yield from [_ASCII] * 20


def train(samples: int) -> bytes:
    """Train the SentencePiece model; the same bytes every time."""
    return demo_tokenizer.train_pieces(iter(texts(samples)), NUM_PIECES)


def write(directory: Path, samples: int = SAMPLES) -> None:
    """Write the tokenizer's files as the random demo checkpoint has them, with this model."""
    directory.mkdir(parents=True, exist_ok=True)
    demo_tokenizer.write_tokenizer(directory, train(samples), NUM_PIECES)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
