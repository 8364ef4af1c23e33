"""Position ids (time, row, column) of a prompt, from the grids of its media."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.messages import MediaSpan


def positions(
    prompt_len: int, spans: Sequence[MediaSpan], spatial_merge: int, temporal_merge: int
) -> tuple[NDArray[np.int32], int]:
    """Return the triple (t, h, w) of every prompt token, and the position of the first generated one.

    Text advances all three by one. Media with a grid of (te, gh, gw) tokens that begin at p take (p + a, p + b, p + c)
    in row-major order, and what follows them begins at p + max(te, gh, gw): the rule the model was trained with. Start
    and end tokens of media are text here. Generated token s has the position `next + s` on all three axes.

    Args:
        prompt_len: tokens in the prompt.
        spans: the prompt's media, by ascending offset.
        spatial_merge: patches along each side of a token.
        temporal_merge: frames in a token of a video.

    Returns:
        int32 [3, prompt_len] and the next position.

    Raises:
        ValueError: spans overlap, lie outside the prompt, or have another number of tokens than their grid.
    """
    out = np.empty((3, prompt_len), np.int32)
    token = position = 0
    for span in spans:
        if span.offset < token or span.offset + span.length > prompt_len:
            raise ValueError(f"media at token {span.offset} overlaps another or ends after token {prompt_len}")
        grid = token_grid(span, spatial_merge, temporal_merge)
        if grid[0] * grid[1] * grid[2] != span.length:
            raise ValueError(f"media at token {span.offset} has {span.length} tokens and a grid of {grid}")
        text = span.offset - token
        out[:, token : span.offset] = np.arange(position, position + text)
        position += text
        out[:, span.offset : span.offset + span.length] = np.indices(grid).reshape(3, -1) + position
        position += max(grid)
        token = span.offset + span.length
    next_position = position + prompt_len - token
    out[:, token:] = np.arange(position, next_position)
    return out, next_position


def token_grid(span: MediaSpan, spatial_merge: int, temporal_merge: int) -> tuple[int, int, int]:
    """Return the span's grid in tokens instead of patches. An image's one frame is not merged."""
    frames, rows, columns = span.grid
    merged = frames if span.kind == "image" else frames // temporal_merge
    return merged, rows // spatial_merge, columns // spatial_merge
