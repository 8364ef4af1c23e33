"""Command `millrace plan`: say what a deployment would hold on a card, without one. Needs config.json alone, and of
weights that are quantised already the headers of their files.

Exit status: 0 it fits, 1 its cache could not hold one sequence of --max-model-len.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from cli.check import GIB, LABEL
from cli.connection import Parser
from services.engine.device_defaults import decide
from services.engine.run.foretold import Foretold, fewest_ranks, foretell
from services.engine.settings import EngineSettings
from services.mm_encoder.settings import MmEncoderSettings
from services.mm_encoder.vision.memory import device_bytes
from shared.errors import ConfigError
from shared.model.checkpoint import Checkpoint
from shared.model.config import ModelConfig, chosen_quantization, load_model_config
from shared.model.config_file import Quantization

FITS, DOES_NOT_FIT = 0, 1
RANKS = (1, 2, 4)
FORMATS: dict[str, Quantization | None] = {"wint4": "wint4", "wint8": "wint8", "bf16": None}


class Card(NamedTuple):
    """Card of the market. `gib`: as CUDA counts its memory, about, which is less than the data sheet says."""

    name: str
    sheet: str
    gib: float
    fastdeploy: tuple[int, int, int] | None  # cards that FastDeploy asks for, in wint4, wint8 and bf16


CARDS = (
    Card("A30", "24 GB", 23.5, (2, 2, 4)),
    Card("RTX-4090", "24 GB", 23.65, None),
    Card("L20", "48 GB", 44.5, (1, 1, 2)),
    Card("A100", "80 GB", 79.2, (1, 1, 1)),
    Card("H800", "80 GB", 79.2, (1, 1, 1)),
    Card("H20", "144 GB", 139.8, (1, 1, 1)),
    Card("H200", "141 GB", 139.8, None),
)


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of a launch, by the names of its flags."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    image_max_pixels: int

    def settings(self, config: ModelConfig, quantization: Quantization | None) -> EngineSettings:
        """Return the engine's, with an mm_encoder on its card.

        Raises:
            ConfigError: a size is not one that the engine has.
        """
        image = self.image_max_pixels // config.vision.patch_size**2
        return EngineSettings(
            redis_url="",
            model="",
            quantization=quantization,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            gpu_memory_utilization=self.gpu_memory_utilization,
            foreign_bytes=device_bytes(config, max(MmEncoderSettings(redis_url="", model="").tower_max_patches, image)),
        )


# FastDeploy's launch for one card of 24 GB, which its table is read for here: it does not say for which.
FASTDEPLOY = Launch(
    max_model_len=32_768,
    max_num_seqs=32,
    max_num_batched_tokens=16_384,
    gpu_memory_utilization=0.9,
    image_max_pixels=12_845_056,
)


def main(words: Sequence[str]) -> int:
    """Run the command and return the exit status.

    Raises:
        ConfigError: a flag is wrong, or so many cards cannot share the model.
        CheckpointError: config.json cannot be read, or the files of quantised weights, or so many cards cannot share
            the groups of these.
    """
    given = _parser().parse_args(words)
    config = load_model_config(given.model)
    quantization, checkpoint = chosen_quantization(config, given.quantization), None
    if config.stored is not None:
        checkpoint = Checkpoint(given.model, headers_only=True)
        quantization = FORMATS.get(config.stored)  # of ours, which loads to what quantising at a start makes
    if given.table:
        if config.stored is not None:
            raise ConfigError(f"--table compares formats, and these weights are quantised already ({config.stored})")
        print("\n".join(table(config)))
        return FITS
    launch = Launch(**{name: getattr(given, name) for name in Launch.__struct_fields__})
    decided = decide(launch.settings(config, quantization), given.memory)
    launch = msgspec.structs.replace(launch, max_num_batched_tokens=decided.max_num_batched_tokens)
    if launch.max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len: {launch.max_model_len} is more than the {config.max_position_embeddings} positions this "
            "model has"
        )
    plan = foretell(config, launch.settings(config, quantization), given.memory, given.tensor_parallel_size, checkpoint)
    for label, text in rows(config, launch, plan, quantization, given.tensor_parallel_size, checkpoint):
        print(f"{label:{LABEL}}{text}")
    return FITS if plan.sequences(launch.max_model_len) else DOES_NOT_FIT


def _parser() -> Parser:
    parser = Parser(
        prog="millrace plan", description="Say what a deployment would hold on a card, without one.", allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="with config.json, which is enough")
    what = parser.add_mutually_exclusive_group(required=True)
    names = ", ".join(card.name for card in CARDS)
    what.add_argument("--card", dest="memory", type=_card, metavar="NAME", help=f"each card: {names}")
    what.add_argument("--memory", type=_memory, metavar="SIZE", help="of each card, as CUDA counts it: 44.5GiB, 48GB")
    what.add_argument("--table", action="store_true", help="cards needed by card and format, beside FastDeploy's")
    parser.add_argument("--quantization", choices=("wint4", "wint8"), help="unset: as config.json asks, else bf16")
    parser.add_argument("--tensor-parallel-size", type=int, choices=RANKS, default=1, metavar="N", help="cards (1)")
    parser.add_argument("--max-model-len", type=int, default=32_768, metavar="TOKENS", help="as of serve (%(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=32, metavar="N", help="as of serve (%(default)s)")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=0, metavar="N", help="as of serve; 0: by the card (%(default)s)"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="as of serve (%(default)s)"
    )
    parser.add_argument(
        "--image-max-pixels",
        type=int,
        default=MmEncoderSettings(redis_url="", model="").mm_processor_kwargs.image_max_pixels,
        metavar="N",
        help="as in --mm-processor-kwargs of serve (%(default)s)",
    )
    return parser


def rows(
    config: ModelConfig,
    launch: Launch,
    plan: Foretold,
    quantization: Quantization | None,
    ranks: int,
    checkpoint: Checkpoint | None,
) -> Iterator[tuple[str, str]]:
    """Yield the plan of one card for people, a fact a row."""
    yield "card", f"{_gib(plan.card)}, of which {launch.gpu_memory_utilization:.0%} may be used; {ranks} of them"
    yield "weights", f"{_gib(plan.weights)}, {config.stored or quantization or config.dtype}"
    yield "mm_encoder", f"{_gib(plan.encoder)}: weights, its largest pass, CUDA's context"
    yield "activations", f"{_gib(plan.activations)}: steps of {launch.max_num_batched_tokens} tokens, workspaces"
    yield "graphs", _gib(plan.graphs) + (": captured steps, buffers between cards" if ranks > 1 else ": captured steps")
    yield "context", f"{_gib(plan.context)}: CUDA and its libraries"
    fitting = plan.sequences(launch.max_model_len)
    if fitting:
        yield "cache", f"{_gib(plan.cache)}, {plan.tokens} tokens"
        each = plan.tokens // launch.max_num_seqs
        yield "sequences", f"{fitting} of {launch.max_model_len} tokens at once, or {launch.max_num_seqs} of {each}"
    else:
        missing = -(-launch.max_model_len // plan.block_size) * plan.block - plan.cache
        yield "cache", f"{_gib(missing)} too little for one sequence of {launch.max_model_len} tokens"
    yield "left", f"{_gib(plan.reserve)} of each card"
    label, forms = "cards needed", FORMATS if config.stored is None else {config.stored: quantization}
    for name, form in forms.items():
        fewest = fewest_ranks(config, launch.settings(config, form), plan.card, RANKS, checkpoint)
        yield label, f"{name}: {fewest or f'more than {RANKS[-1]}'}"
        label = ""
    yield "verdict", "fits" if fitting else "does not fit: quantise, shorten the context, or add cards"


def table(config: ModelConfig) -> list[str]:
    """Return lines of Markdown: the cards that FastDeploy asks for, and those that we need for its launch."""
    lines = ["| card | wint4 | wint8 | bf16 | FastDeploy's |", "|---|--:|--:|--:|--:|"]
    for card in CARDS:
        cells = []
        for form in FORMATS.values():
            settings, size = FASTDEPLOY.settings(config, form), int(card.gib * GIB)
            ranks = fewest_ranks(config, settings, size, RANKS)
            tokens = f" ({foretell(config, settings, size, ranks).tokens // 1000:,}K tokens)" if ranks else ""
            cells.append(f"{ranks or '-'}{tokens}")
        theirs = " / ".join(map(str, card.fastdeploy)) if card.fastdeploy else "-"
        lines.append(f"| {card.name}, {card.sheet} | {' | '.join(cells)} | {theirs} |")
    return lines


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _card(text: str) -> int:
    for card in CARDS:
        if card.name.lower() == text.lower().replace(" ", "-"):
            return int(card.gib * GIB)
    known = ", ".join(card.name for card in CARDS)
    raise argparse.ArgumentTypeError(f"{text!r} is none of {known}; --memory takes any card's size")


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB)", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size as 44.5GiB, 48GB or 46068MiB")
    return int(float(match[1]) * {"GiB": GIB, "GB": 10**9, "MiB": 2**20}[match[2]])
