"""Figures of the demo's card: accuracy by kind of question and by format, with intervals, and against the aims."""

import json
import math
from pathlib import Path

from benchmarks.demo_model.questions import SETS
from cli.demo_tokenizer import write_json

Counts = dict[str, dict[str, list[int]]]  # format: set: [right answers, questions]
WAYS = ("without thinking", "pictures of other sizes")  # other ways to ask, in bf16: in place of a format
BEGIN, END = "<!-- figures: make eval -->\n", "<!-- end of figures -->\n"

# What was aimed at, in percent, and the sets that it is measured on.
AIMS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("shapes, colours, counts", 95, ("shapes, colours, places", "counts up to 6")),
    ("words of up to 6 letters", 90, ("words up to 6 letters",)),
    ("two pictures", 90, ("two pictures",)),
    ("video counts", 85, ("video counts",)),
    ("two-digit sums, one-digit products", 98, ("sums and products",)),
    ("tool choice and arguments", 97, ("tool calls",)),
    ("JSON", 97, ("JSON",)),
    ("questions about Millrace", 85, ("Millrace",)),
)


def write(directory: Path, counts: Counts) -> None:
    """Put the counts into the checkpoint's accuracy.json, and what they say into its README.md."""
    write_json(directory / "accuracy.json", counts)
    card = directory / "README.md"
    before, rest = card.read_text().split(BEGIN)
    card.write_text(before + BEGIN + figures(counts) + END + rest.split(END)[1])


def read(directory: Path) -> Counts:
    """The counts of a checkpoint."""
    counts: Counts = json.loads((directory / "accuracy.json").read_bytes())
    return counts


def figures(counts: Counts) -> str:
    """The card's tables. The aims are for bf16, what the checkpoint is served in unless told otherwise."""
    formats, ways = ({name: each for name, each in counts.items() if (name in WAYS) == way} for way in (False, True))
    parts = [table(formats)]
    if "bf16" in formats:
        parts += ["Against what was aimed at:", aims(formats["bf16"])]
        parts += [f"Mean of kinds against bf16's, in points: {differences(formats)}."] if len(formats) > 1 else []
    parts += ["Asked in other ways, in bf16 (pictures of other sizes are JPEG files):", table(ways)] if ways else []
    return "\n" + "\n\n".join(parts) + "\n\n"


def table(counts: Counts) -> str:
    """Accuracy by set and format, in percent, with its interval."""
    names, first = list(counts), next(iter(counts.values()))
    lines = ["| kind | n | " + " | ".join(names) + " |", "|---|--:|" + "--:|" * len(names)]
    lines += [
        f"| {name} | {first[name][1]} | {' | '.join(_cell(*counts[each].get(name, ())) for each in names)} |"
        for name in SETS
        if name in first
    ]
    means = " | ".join(f"{mean(each):.2f}" for each in counts.values())
    lines.append(f"| mean of kinds | {sum(n for _, n in first.values())} | {means} |")
    return "\n".join(lines)


def aims(counts: dict[str, list[int]]) -> str:
    """What was reached of what was aimed at."""
    lines = ["| | aim | bf16 |", "|---|--:|--:|"]
    for name, aim, sets in AIMS:
        if all(each in counts for each in sets):
            right, count = (sum(counts[each][i] for each in sets) for i in (0, 1))
            missed = ", missed" if 100 * right < aim * count else ""
            lines.append(f"| {name} | {aim} | {_cell(right, count)}{missed} |")
    return "\n".join(lines)


def differences(counts: Counts) -> str:
    """Each other format's mean against bf16's."""
    base = mean(counts["bf16"])
    return ", ".join(f"{name} {mean(each) - base:+.2f}" for name, each in counts.items() if name != "bf16")


def mean(counts: dict[str, list[int]]) -> float:
    """The mean accuracy of the sets, in percent."""
    return 100 * sum(right / count for right, count in counts.values()) / len(counts)


def _cell(right: int = 0, count: int = 0) -> str:
    if not count:
        return ""
    low, high = interval(right, count)
    return f"{100 * right / count:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return middle - half, middle + half
