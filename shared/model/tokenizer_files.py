"""Token table of a checkpoint: how its files encode text, and what each id stands for.

The checkpoint's own file decides the back end: `tokenizer.model` (SentencePiece, whose library the model's authors
use) or, where there is none, `tokenizer.json` (tokenizers). Both are reduced to one `TokenTable`; all later code is the
same for both.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import sentencepiece
import tokenizers

from shared.errors import CheckpointError

SENTENCEPIECE_FILES = ("tokenizer.model", "spm.model", "ernie_token_100k.model")
SPACE = "▁"  # how both back ends write a space inside a piece

# Control tokens that are text to a reader or a parser.
VISIBLE = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Tokens of a checkpoint, whichever kind of file they are from."""

    encode: Callable[[str], list[int]]  # may return control ids where the text spells or normalises to their names
    token_bytes: list[bytes]  # by id; b"" for specials and for ids nothing owns
    control: dict[str, int]
    literals: dict[str, int]  # ordinary added tokens `encode` does not know
    warnings: tuple[str, ...] = ()  # fields that are ignored; each names the file and the field


class _Piece(NamedTuple):
    """Token of a model file."""

    text: str
    kind: int


# The types of a SentencePiece piece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_ANGLED = re.compile(r"<.+>", re.DOTALL)
_ANGLED_BARS = re.compile(r"<\|.+\|>", re.DOTALL)

_NamedToken = str | dict[str, Any]
T = TypeVar("T")


class _AddedToken(msgspec.Struct):
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    id: Annotated[int, msgspec.Meta(ge=0)] | None = None  # tokenizer.json has it here, tokenizer_config.json as the key


class _TokenizerConfig(msgspec.Struct):
    """Fields of tokenizer_config.json and special_tokens_map.json, which both may name special tokens."""

    added_tokens_decoder: dict[str, _AddedToken] | None = {}
    add_prefix_space: bool | None = None
    bos_token: _NamedToken | None = None
    eos_token: _NamedToken | None = None
    unk_token: _NamedToken | None = None
    pad_token: _NamedToken | None = None
    cls_token: _NamedToken | None = None
    sep_token: _NamedToken | None = None
    mask_token: _NamedToken | None = None
    additional_special_tokens: list[_NamedToken] | None = []
    extra_special_tokens: list[_NamedToken] | dict[str, _NamedToken] | None = []


class _JsonModel(msgspec.Struct):
    type: str
    vocab: dict[str, int]
    unk_token: str | None = None
    byte_fallback: bool = False


class _JsonTokenizer(msgspec.Struct):
    model: _JsonModel
    added_tokens: list[_AddedToken] = []


def load_tokens(directory: Path) -> TokenTable:
    files = (directory / "tokenizer_config.json", directory / "special_tokens_map.json")
    config, special_map = (_read(path, _TokenizerConfig) or _TokenizerConfig() for path in files)
    table = _load_model(directory, config, _special_names(config) | _special_names(special_map))
    nulls = (_nulls(path, read) for path, read in zip(files, (config, special_map), strict=True))
    return replace(table, warnings=tuple(chain.from_iterable(nulls)))


def _nulls(path: Path, config: _TokenizerConfig) -> Iterator[str]:
    for field in "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens":
        if getattr(config, field) is None:
            yield f"{path}: {field} is null; it is taken for empty"


def _load_model(directory: Path, config: _TokenizerConfig, names: Mapping[str, None]) -> TokenTable:
    for name in SENTENCEPIECE_FILES:
        if (directory / name).exists():
            return _from_sentencepiece(directory / name, config, names)
    if (directory / "tokenizer.json").exists():
        return _from_json(directory / "tokenizer.json", names)
    raise CheckpointError(f"{directory} has neither tokenizer.model nor tokenizer.json")


def _special_names(config: _TokenizerConfig) -> dict[str, None]:
    """Return the texts of the special tokens, without single characters, in transformers' order of ids for new ones."""
    extra = config.extra_special_tokens or []
    named = [config.bos_token, config.eos_token, config.unk_token, config.pad_token, config.cls_token]
    named += [config.sep_token, config.mask_token, *(config.additional_special_tokens or ())]
    named += extra.values() if isinstance(extra, dict) else extra
    texts = (token if isinstance(token, str) else token.get("content") for token in named if token is not None)
    return dict.fromkeys(text for text in texts if text and len(text) > 1)


def _from_sentencepiece(path: Path, config: _TokenizerConfig, names: Mapping[str, None]) -> TokenTable:
    proto = path.read_bytes()
    if config.add_prefix_space:
        raise CheckpointError(f"{path.parent}: add_prefix_space is true; the model was trained without")
    # A later occurrence of a protobuf field wins and messages merge: normalizer_spec { add_dummy_prefix: false }.
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        pieces = list(_sentencepiece_pieces(proto))
    except (RuntimeError, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no SentencePiece model") from error
    added = _added_tokens(path.parent, config, names, {piece.text: i for i, piece in enumerate(pieces)})
    return _assemble(path, processor.encode, pieces, added, names)


def _sentencepiece_pieces(proto: bytes) -> Iterator[_Piece]:
    """Yield the pieces of a serialized ModelProto in id order: its field 1, with text in field 1 and type in field 3.

    The library does not tell user-defined pieces, which text always turns into, from merged ones.
    """
    for field, value in _protobuf_fields(proto):
        if field == 1 and isinstance(value, bytes):
            piece = dict(_protobuf_fields(value))
            text, kind = piece.get(1, b""), piece.get(3, _NORMAL)
            if isinstance(text, bytes) and isinstance(kind, int):
                yield _Piece(text.decode(), kind)


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield field numbers and values of one message: varints as int, all others as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = 8 if wire == 1 else 4
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _added_tokens(
    directory: Path, config: _TokenizerConfig, names: Iterable[str], pieces: Mapping[str, int]
) -> list[_AddedToken]:
    """Return the tokens beside the SentencePiece model, from either file or by name, numbered as transformers does."""
    found: dict[str, _AddedToken] = {}
    for key, token in (config.added_tokens_decoder or {}).items():
        if not key.isdecimal():
            raise CheckpointError(f"{directory}/tokenizer_config.json: added_tokens_decoder has the id {key!r}")
        token.id = int(key)
        found[token.content] = token
    for text, token_id in (_read(directory / "added_tokens.json", dict[str, int]) or {}).items():
        token = found.setdefault(text, _AddedToken(text, id=token_id))
        if token.id != token_id:
            raise CheckpointError(f"{directory}: token {text!r} has the ids {token.id} and {token_id}")
    after = max([len(pieces) - 1, *(token.id for token in found.values() if token.id is not None)])
    for text in names:
        if text not in found and text not in pieces:
            after += 1
            found[text] = _AddedToken(text, special=True, id=after)
    return list(found.values())


def _from_json(path: Path, names: Mapping[str, None]) -> TokenTable:
    raw = _read(path, dict[str, Any])
    parsed = _read(path, _JsonTokenizer)
    assert raw is not None
    assert parsed is not None
    model = parsed.model
    if model.type != "BPE" or not model.byte_fallback:
        raise CheckpointError(f"{path}: model.type {model.type!r} is not BPE with byte_fallback")
    ordered = {i: text for text, i in model.vocab.items()}
    pieces = [
        _Piece(text, _piece_kind(text, model))
        for text in (ordered.get(i, "") for i in range(max(ordered, default=-1) + 1))
    ]
    # Control tokens are taken out of the back end, with whatever would add them to text by itself. So are added
    # tokens the model file does not hold: the library would number them anew.
    ordinary = [
        entry
        for entry, token in zip(raw.get("added_tokens", []), parsed.added_tokens, strict=True)
        if token.content in model.vocab and not _is_control(token, names)
    ]
    stripped = raw | {"added_tokens": ordinary, "post_processor": None, "truncation": None, "padding": None}
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stripped))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: {error}") from error

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return _assemble(path, encode, pieces, parsed.added_tokens, names)


def _piece_kind(text: str, model: _JsonModel) -> int:
    if text == model.unk_token:
        return _UNKNOWN
    return _BYTE if _BYTE_PIECE.fullmatch(text) else _NORMAL


def _is_control(token: _AddedToken, names: Mapping[str, None]) -> bool:
    # A single character is text, whatever a file calls it: some list the digits as special.
    if len(token.content) < 2:
        return False
    return token.special or token.content in names or _ANGLED.fullmatch(token.content) is not None


def _assemble(
    path: Path,
    encode: Callable[[str], list[int]],
    pieces: list[_Piece],
    added: list[_AddedToken],
    names: Mapping[str, None],
) -> TokenTable:
    """Combine a model file's pieces and the tokens added beside it to one table.

    Raises:
        CheckpointError: two tokens claim one id, or text does not come back from its ids.
    """
    texts = [piece.text for piece in pieces]
    data = [_piece_bytes(piece, special=piece.text in names) for piece in pieces]
    control = {piece.text: i for i, piece in enumerate(pieces) if _is_control_piece(piece, names)}
    literals: dict[str, int] = {}
    for token in added:
        if token.id is None:
            raise CheckpointError(f"{path.parent}: added token {token.content!r} has no id")
        room = token.id + 1 - len(texts)
        texts += [""] * room
        data += [b""] * room
        if texts[token.id] not in ("", token.content):
            raise CheckpointError(f"{path.parent}: {texts[token.id]!r} and {token.content!r} both have id {token.id}")
        is_new, texts[token.id] = not texts[token.id], token.content
        special = token.special or token.content in names
        if _is_control(token, names):
            control[token.content] = token.id
            data[token.id] = b"" if special and token.content not in VISIBLE else token.content.encode()
        elif is_new:
            data[token.id] = token.content.encode()
            literals[token.content] = _plain_literal(path, token)
    table = TokenTable(encode, data, control, literals)
    probe = "a b"
    if b"".join(data[i] for i in encode(probe)) != probe.encode():
        raise CheckpointError(f"{path}: the tokens of {probe!r} are not its text")
    return table


def _plain_literal(path: Path, token: _AddedToken) -> int:
    if token.id is None or token.lstrip or token.rstrip or token.single_word:
        raise CheckpointError(f"{path.parent}: added token {token.content!r} has lstrip, rstrip or single_word")
    return token.id


def _is_control_piece(piece: _Piece, names: Mapping[str, None]) -> bool:
    """Return True if a piece of the model file itself is a control token.

    A merged piece like <br> is text; one like <|...|> or one the server parses is not, however it got there.
    """
    if len(piece.text) < 2:
        return False
    if piece.kind in (_UNKNOWN, _CONTROL) or piece.text in names or piece.text in VISIBLE:
        return True
    if piece.kind == _USER_DEFINED:
        return _ANGLED.fullmatch(piece.text) is not None
    return piece.kind == _NORMAL and _ANGLED_BARS.fullmatch(piece.text) is not None


def _piece_bytes(piece: _Piece, *, special: bool) -> bytes:
    if piece.text in VISIBLE:
        return piece.text.encode()
    if special or (piece.kind in (_UNKNOWN, _CONTROL) and len(piece.text) > 1):
        return b""
    byte = _BYTE_PIECE.fullmatch(piece.text) if piece.kind == _BYTE else None
    return bytes.fromhex(byte[1]) if byte else piece.text.replace(SPACE, " ").encode()


def _read(path: Path, kind: type[T]) -> T | None:
    """Decode a JSON file as `kind`; return None if there is no such file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise CheckpointError(f"{path}: {error}") from error
