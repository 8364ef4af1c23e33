"""Token embeddings, with the rows of media put in their places."""

from torch import Tensor


def embed(table: Tensor, token_ids: Tensor, rows: Tensor, embeds: Tensor) -> Tensor:
    """
    Args:
        table: [vocabulary, H].
        token_ids: [N] int64.
        rows: [M] int64, distinct: rows of the result that are not looked up.
        embeds: [M, H], dtype of the table: what they are instead.

    Returns:
        [N, H], a new tensor.
    """
    found = table[token_ids]
    return found.index_copy_(0, rows, embeds) if len(rows) else found
