"""Token embeddings, with the embeddings of media in their rows."""

from torch import Tensor


def embed(table: Tensor, token_ids: Tensor, rows: Tensor, embeds: Tensor) -> Tensor:
    """Look up token embeddings, and replace the rows of media.

    Args:
        table: [vocabulary, H].
        token_ids: [N] int64.
        rows: [M] int64, distinct: rows of the result that are media.
        embeds: [M, H], dtype of the table: their embeddings.

    Returns:
        [N, H], a new tensor.
    """
    found = table[token_ids]
    return found.index_copy_(0, rows, embeds) if len(rows) else found
