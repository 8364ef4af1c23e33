"""Cut of a step's attention into parts: sequences that decode, chunks of prompts, and long prompts one by one.

Each kind has its own kernel, and none should see the others' sequences: what decodes beside a prompt would fill one
row of the prompt's tiles. Decoding waits for memory where prompts wait for the matrix units, so the device computes
both at once: first come the prompts, whose programs are few, and those that decode fill up what they leave.
"""

from itertools import groupby, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from services.engine.kernels.reference.paged_attention import MIN_PROMPT
from services.engine.model.inputs import AttentionPart
from services.engine.run.upload import upload

Numbers = NDArray[np.int32]


def attention_parts(
    blocks: list[bytes], query_start: Numbers, context_lens: Numbers, block_size: int, device: torch.device
) -> tuple[AttentionPart, ...]:
    """Return the parts of a step's attention, on the device.

    Args:
        blocks: block numbers of each sequence, as int32.
        query_start: [S + 1] first rows.
        context_lens: [S].
    """
    lengths = tuple(zip(np.diff(query_start).tolist(), context_lens.tolist(), strict=True))
    runs = sorted(cut(lengths), key=lambda run: lengths[run[0]][0] == 1)
    arrays: list[NDArray[np.int32]] = []
    for first, stop in runs:
        longest = int(context_lens[first:stop].max())
        arrays.append(block_tables(blocks[first:stop], -(-longest // block_size)))
        arrays.append(query_start[first : stop + 1] - query_start[first])
        arrays.append(context_lens[first:stop])
    moved = iter(upload(arrays, device))
    return tuple(
        AttentionPart(
            rows=slice(int(query_start[first]), int(query_start[stop])),
            block_tables=next(moved),
            query_start=next(moved),
            context_lens=next(moved),
            max_query_len=max(new for new, _ in lengths[first:stop]),
            max_context_len=max(context for _, context in lengths[first:stop]),
            lengths=lengths[first:stop],
            # Only the first part of its kind: they share what programs leave for each other.
            beside=nth > 0 and lengths[first][0] == 1 < lengths[runs[nth - 1][0]][0],
        )
        for nth, (first, stop) in enumerate(runs)
    )


def cut(lengths: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Return the sequences [first, stop) of each part.

    Args:
        lengths: of each sequence its new tokens, and all of them.
    """
    kinds = [_kind(nth, *length) for nth, length in enumerate(lengths)]
    stops = np.cumsum([0, *(len(list(run)) for _, run in groupby(kinds))]).tolist()
    return list(pairwise(stops))


def _kind(nth: int, new: int, context: int) -> tuple[str, int]:
    """Return the kind of a sequence; those of one kind that follow each other are a part."""
    if new == 1:
        return "decode", 0
    return ("whole", nth) if new == context >= MIN_PROMPT else ("chunk", 0)


def block_tables(blocks: list[bytes], width: int) -> Numbers:
    """Return [S, width] padded with 0."""
    tables = np.zeros((len(blocks), width), np.int32)
    for table, content in zip(tables, blocks, strict=True):
        used = np.frombuffer(content, np.int32)[:width]
        table[: len(used)] = used
    return tables
