"""Text to ids and ids to bytes. Control tokens never come out of text, and text never out of their names.

The checkpoint's own file decides the back end: `tokenizer.json` (tokenizers) or `tokenizer.model` (SentencePiece).
"""

from pathlib import Path


class Tokenizer:
    """One vocabulary. Safe to share between tasks of a process."""

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """
        Raises:
            CheckpointError: neither file exists, or a token the server needs (</think>, ...) is missing.
        """
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    @property
    def control(self) -> dict[str, int]:
        """Control tokens by their text: specials and every added token of the form <...>."""
        raise NotImplementedError

    def token_id(self, text: str) -> int | None:
        """The id of the token whose text is exactly `text`."""
        raise NotImplementedError

    def encode_text(self, text: str) -> list[int]:
        """Ordinary text: whatever it contains, no control token comes out."""
        raise NotImplementedError

    def encode_template(self, text: str) -> list[int]:
        """Trusted text (a template's own): control tokens are recognised, the text between is `encode_text`'s."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes this token adds to an answer (perhaps part of a character); b"" for specials.

        Control tokens that are text to a reader or a parser (<think>, </think>, <tool_call>, </tool_call>) give
        their name.
        """
        raise NotImplementedError
