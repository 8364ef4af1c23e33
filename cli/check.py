"""Command `millrace check`: report on how a model directory would be served, within seconds, without reading weights.

Exit status: 0 it will be served (perhaps with warnings), 1 it will not (the errors say why), 2 there is no such
directory.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.connection import Parser
from cli.inspection import Chat, Memory, Report, Tokens, inspect
from shared.model.config import ModelConfig
from shared.model.generation import GenerationDefaults
from shared.visible import visible

SERVED, NOT_SERVED = 0, 1
LABEL = 16  # columns
GIB = 2**30

Row = tuple[str, str]


def main(words: Sequence[str]) -> int:
    """Run the command and return the exit status.

    Raises:
        ConfigError: a flag is wrong, or there is no such directory.
    """
    flags = Parser(
        prog="millrace check", description="Report how a model directory would be served.", allow_abbrev=False
    )
    flags.add_argument("directory", type=_directory, metavar="DIR", help="the checkpoint")
    flags.add_argument("--json", action="store_true", help="everything, as one JSON object")
    given = flags.parse_args(words)
    report = inspect(given.directory)
    if given.json:
        # In ASCII: a file name that is no UTF-8 is half a surrogate pair here, which msgspec does not encode.
        print(json.dumps(msgspec.to_builtins(report, str_keys=True)))
    else:
        _show(list(rows(report)))
    return SERVED if report.served else NOT_SERVED


def _directory(text: str) -> Path:
    if not os.path.isdir(text):  # pathlib's raises where a parent may not be entered or a name is too long
        raise argparse.ArgumentTypeError(f"{text} is not a directory (models are read from disk, never downloaded)")
    return Path(text)


def _show(shown: list[Row]) -> None:
    """Print aligned and in colour on a terminal; elsewhere one line a fact, so that grep finds it whole."""
    if not sys.stdout.isatty():
        print("\n".join(f"{label:{LABEL}}{visible(text)}" for label, text in shown))
        return
    table = Table.grid(padding=(0, 2))
    styles = {"error": "red", "warning": "yellow"}
    for label, text in shown:
        table.add_row(Text(label, "bold"), Text(visible(text), styles.get(label, "")))
    Console(highlight=False).print(table)


def rows(report: Report) -> Iterator[Row]:
    """Yield the report for people, a fact a row."""
    yield "directory", report.directory
    if report.model:
        yield from _model(report.model)
    if report.weight_files:
        yield "on disk", f"{len(report.weight_files)} safetensors files, {_gib(sum(report.weight_files.values()))}"
    if report.memory:
        yield from _memory(report.memory)
    if report.tokens:
        yield from _tokens(report.tokens)
    if report.sampling:
        yield "sampling", _sampling(report.sampling)
    if report.chat:
        yield from _chat(report.chat)
    yield from (("warning", text) for text in report.warnings)
    yield from (("error", text) for text in report.errors)
    yield "verdict", "will be served" if report.served else "will not be served"


def _model(model: ModelConfig) -> Iterator[Row]:
    yield (
        "decoder",
        f"{model.num_layers} layers of {model.hidden_size}, {model.num_heads} heads of {model.head_dim} and "
        f"{model.num_kv_heads} for keys and values, {model.vocab_size} rows of vocabulary, {model.dtype}",
    )
    yield "context", f"{model.max_position_embeddings} positions"
    yield (
        "experts",
        f"{model.num_experts} of {model.text_expert_size} for text, {model.num_experts} of "
        f"{model.vision_expert_size} for vision, {model.experts_per_token} a token; shared {model.shared_expert_size}",
    )
    dense = ", ".join(map(str, model.dense_layers)) or "none"
    yield "dense layers", f"{dense}; {model.intermediate_size} wide"
    height = (model.head_dim // 2 - model.time_freqs) // 2
    yield "mrope sections", f"{height} height, {height} width, {model.time_freqs} time; theta {model.rope_theta:g}"
    vision = model.vision
    yield (
        "vision tower",
        f"{vision.depth} layers of {vision.hidden_size}, {vision.num_heads} heads, patches of {vision.patch_size}",
    )
    if model.stored:
        yield "quantization", f"{model.stored}, in the files; they are served as they are"
    if model.quantization:
        yield "quantization", f"{model.quantization}, as config.json asks; --quantization decides otherwise"


def _memory(memory: Memory) -> Iterator[Row]:
    for name, size in memory.decoder.items():
        large = memory.decoder_large_card[name]
        more = f" ({_gib(large)} on a card of 64 GiB or more)" if large != size else ""
        yield f"{name}", f"{_gib(size)} of decoder weights{more}"
    if memory.head:
        yield "", f"{_gib(memory.head)} of each are lm_head's, which is dropped if it equals the embedding"
    yield "vision", f"{_gib(memory.vision)} of weights"
    yield "cache", f"{memory.cache_per_token} bytes a token, {_gib(memory.cache_per_context)} for the longest context"


def _tokens(tokens: Tokens) -> Iterator[Row]:
    yield "end ids", ", ".join(f"{token} {text}".rstrip() for token, text in tokens.end.items())
    yield "tokenizer", f"{tokens.count} ids"
    known = [f"{text} {'none' if token is None else token}" for text, token in tokens.special.items()]
    yield "special tokens", ", ".join(known)


def _sampling(sampling: GenerationDefaults) -> str:
    values = msgspec.structs.asdict(sampling)
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if name != "warnings")


def _chat(chat: Chat) -> Iterator[Row]:
    yield "chat template", chat.template
    yield "sample", repr(chat.rendered)
    inside = "inside <think>" if chat.thinking else "outside <think>"
    yield "", f"{chat.tokens} tokens and the picture's; the answer begins {inside}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.2f} MiB"
