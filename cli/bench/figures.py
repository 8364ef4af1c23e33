"""Figures of a run, from the streams that its clients saw.

A gap is the time between two events of one answer, as for every client of SSE. Servers write tokens that pile up as one
event, and none for one that is the first bytes of a character; `tokens_per_event` says how many tokens an event had, on
average over the answers that were read to their end.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from cli.bench.load import Part

MOST_ERRORS = 10


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one load. Times are milliseconds; NaN, in JSON null, where nothing was measured."""

    load: str
    seconds: float  # from the beginning to the last event, or to the time at which what was open was given up
    answered: int
    open: int  # when the time was up: their events count
    failed: int
    errors: dict[str, int]  # the most frequent, with how often each came
    output_tok_s: float
    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float
    gap_p999: float
    tokens_per_event: float
    client_cpu: float  # of a core, of the busiest client process: near 1 the client is the limit
    guesses_right: float = math.nan  # share of the guessed tokens, by the server's metrics, where it has told them
    tokens_guessed: float = math.nan  # share of all tokens that were right guesses


class First(msgspec.Struct, frozen=True, kw_only=True):
    """Times to the first token of requests of one length, one after the other on an idle server, in milliseconds."""

    prompt: int  # tokens
    ttft: list[float]
    longest_gap: list[float]
    errors: list[str]

    @property
    def ratio(self) -> float:
        """Return the first over the last."""
        return self.ttft[0] / self.ttft[-1] if len(self.ttft) > 1 else math.nan


def figures(name: str, parts: Sequence[Part], begin: float, seconds: float | None) -> Figures:
    """Compute the figures of a load that began at `begin`; `seconds`: when what was open was given up."""
    answers = [answer for part in parts for answer in part.answers]
    whole = [answer for answer in answers if answer.ended is not None and answer.error is None]
    events = sum(len(answer.events) for answer in whole)
    share = sum(answer.tokens or 0 for answer in whole) / events if events else math.nan
    last = max((answer.events[-1] for answer in answers if answer.events), default=begin)
    took = seconds if seconds is not None else last - begin
    cut = sum(len(answer.events) for answer in answers if answer.ended is None)  # whose tokens nobody has counted
    tokens = sum(answer.tokens or 0 for answer in whole) + (cut * share if cut else 0.0)
    ttft = sorted(1000 * (answer.events[0] - answer.sent) for answer in answers if answer.events)
    gaps = sorted(1000 * gap for answer in answers for gap in _gaps(answer.events))
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    return Figures(
        load=name,
        seconds=took,
        answered=len(whole),
        open=sum(answer.ended is None for answer in answers),
        failed=errors.total(),
        errors=dict(errors.most_common(MOST_ERRORS)),
        output_tok_s=tokens / took if took > 0 else math.nan,
        ttft_p50=quantile(ttft, 0.5),
        ttft_p99=quantile(ttft, 0.99),
        gap_p50=quantile(gaps, 0.5),
        gap_p99=quantile(gaps, 0.99),
        gap_p999=quantile(gaps, 0.999),
        tokens_per_event=share,
        client_cpu=max((part.cpu for part in parts), default=0.0),
    )


def first_of(prompt: int, part: Part) -> First:
    """Compute the figures of requests of one length, one after the other."""
    read = [answer for answer in part.answers if answer.events]
    return First(
        prompt=prompt,
        ttft=[1000 * (answer.events[0] - answer.sent) for answer in read],
        longest_gap=[1000 * max(_gaps(answer.events), default=0.0) for answer in read],
        errors=[answer.error for answer in part.answers if answer.error is not None],
    )


def _gaps(events: Sequence[float]) -> Iterable[float]:
    return (after - before for before, after in pairwise(events))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of ordered values, between two of them by proportion, as numpy does."""
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# ------------------------------------------------------------------------------------------------------------ tables

TITLES = ("load", "answered", "open", "failed", "tok/s", "TTFT p50", "p99", "gap p50", "p99", "p99.9", "tokens/event")
GUESSES = ("guesses right", "tokens guessed")


def table(rows: Sequence[Figures]) -> str:
    """Return a table in Markdown; times in milliseconds. Guesses are in it where there were some."""
    told = any(not math.isnan(row.guesses_right) for row in rows)
    cells = [
        (
            *(row.load, f"{row.answered}", f"{row.open}", f"{row.failed}", f"{row.output_tok_s:,.0f}"),
            *(f"{row.ttft_p50:,.1f}", f"{row.ttft_p99:,.1f}"),
            *(f"{row.gap_p50:.2f}", f"{row.gap_p99:.2f}", f"{row.gap_p999:.2f}", f"{row.tokens_per_event:.2f}"),
            *((f"{row.guesses_right:.2f}", f"{row.tokens_guessed:.2f}") if told else ()),
        )
        for row in rows
    ]
    return markdown((*TITLES, *(GUESSES if told else ())), cells)


def first_table(rows: Sequence[First]) -> str:
    """Return a table in Markdown of first requests against the last of their length."""
    cells = [
        (
            f"{row.prompt:,}",
            *((f"{row.ttft[0]:,.1f}", f"{row.ttft[-1]:,.1f}", f"{row.ratio:.2f}") if row.ttft else ("", "", "")),
            *((f"{row.longest_gap[0]:,.1f}", f"{row.longest_gap[-1]:,.1f}") if row.ttft else ("", "")),
            f"{len(row.errors)}",
        )
        for row in rows
    ]
    return markdown(("prompt", "TTFT first", "last", "ratio", "longest gap first", "last", "failed"), cells)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns, the first to the left and numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    return "\n".join([line(titles), line(rule), *(line(row) for row in rows)])
