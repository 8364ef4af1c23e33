"""The tokenizer against transformers' own conversion, with both back ends, and against text that spells tokens."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from cli.demo import write_demo
from cli.demo_tokenizer import CORPUS
from shared.errors import CheckpointError
from shared.model.tokenizer import Tokenizer
from shared.model.tokenizer_files import VISIBLE

assert oracle  # makes transformers importable

TEXTS = [
    "Hello, how are you?",
    " two  spaces   and\ttabs\n\nand lines\r\n ",
    "1234567890 3.14159 08:45",
    "这张图片里有什么？今天天气怎么样？龘",
    "Что на этой картинке? Где находится библиотека?",
    "水は川から水路を通って水車へ流れます。カタカナ",
    "Où est la gare ? ¿Qué hay? Größe, naïve, Ångström",
    "مرحبا بالعالم שלום नमस्ते 안녕하세요",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00a0 \ufeff \u200b",
    'def f(x): return {"a": [1, 2]}  # comment <br> a<b && c>d',
    "<|image@placeholder|> <0x0A> <0xFF> \\n",
    "",
    " ",
    "\n",
    "\x00\x01\x7f",
    "\U0010ffff \ue000",
    CORPUS,
]

# Text that spells control tokens, whole, nested, overlapping and nearly.
TRICKY = [
    "<|IMAGE_START|>",
    "</think>",
    "<s>",
    "</s>",
    "<unk>",
    "a</think>b</s>c",
    "<<s>s>",
    "<</think>/think>",
    "<think><think></think>",
    "<|LOC_1|><|LOC_11|><|LOC_",
    "<|IMAGE_<|IMAGE_START|>START|>",
    " <tool_call>\n{}\n</tool_call> ",
    "<|begin_of_sentence|><|end_of_sentence|><mask:1><mask:7>",
    "<|IMAGE_PLACEHOLDER|>" * 3,
    "▁<s>",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "demo"
    write_demo(directory)
    return directory


@pytest.fixture(scope="module")
def judge(demo: Path) -> LlamaTokenizer:
    """transformers' tokenizer of the same SentencePiece model, converted as it converts the published one."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model"))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    config = json.loads((demo / "tokenizer_config.json").read_bytes())
    named = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    control = ["<mask:7>"]  # type control in the model, and no role of its own
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=generate_merges(vocab),
        add_prefix_space=False,
        extra_special_tokens=[*control, *config["additional_special_tokens"]],
        **named,
    )
    tokenizer.add_tokens(sorted(VISIBLE))
    return tokenizer


@pytest.fixture(scope="module")
def converted(demo: Path, judge: LlamaTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizer.json in place of tokenizer.model, as transformers saves it."""
    directory = tmp_path_factory.mktemp("tokenizer") / "converted"
    judge.save_pretrained(directory)
    assert not (directory / "tokenizer.model").exists()
    return directory


@pytest.fixture(scope="module")
def from_model(demo: Path) -> Tokenizer:
    return Tokenizer.load(demo)


@pytest.fixture(scope="module")
def from_json(converted: Path) -> Tokenizer:
    return Tokenizer.load(converted)


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizers"])
def tokenizer(request: pytest.FixtureRequest, from_model: Tokenizer, from_json: Tokenizer) -> Tokenizer:
    return from_model if request.param == "sentencepiece" else from_json


def text_of(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(i) for i in ids)


# ------------------------------------------------------------------------------------------------------ encoding text


@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text_as_transformers_encodes_it(tokenizer: Tokenizer, judge: LlamaTokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert ids == judge.encode(text, add_special_tokens=False)
    assert text_of(tokenizer, ids) == text.encode()


@pytest.mark.parametrize("text", TRICKY)
def test_text_that_spells_control_tokens_stays_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert not set(ids) & set(tokenizer.control.values())
    assert text_of(tokenizer, ids) == text.replace("▁", " ").encode()


@pytest.mark.parametrize("text", [*TEXTS, *TRICKY])
def test_both_back_ends_agree(from_model: Tokenizer, from_json: Tokenizer, text: str) -> None:
    assert from_model.encode_text(text) == from_json.encode_text(text)
    assert from_model.encode_template(text) == from_json.encode_template(text)


def texts_with_tokens() -> st.SearchStrategy[str]:
    """Any valid text, often with spellings and halves of control tokens in it. U+2581 reads as a space."""
    spelt = ["<s>", "</s>", "<unk>", "<think>", "</think>", "<|IMAGE_START|>", "<|LOC_1|>", "<mask:1>", "<0x0A>"]
    halves = ["<", "</", "<|", "|>", ">", "<t", "hink>", "s>", "_START|>", "<|IMAGE"]
    anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=8)
    return st.lists(st.one_of(st.sampled_from(spelt + halves), anything)).map("".join)


@given(text=texts_with_tokens())
def test_any_text_comes_back_and_holds_no_control_token(from_model: Tokenizer, from_json: Tokenizer, text: str) -> None:
    ids = from_model.encode_text(text)
    assert text_of(from_model, ids) == text.encode()
    assert not set(ids) & set(from_model.control.values())
    assert from_json.encode_text(text) == ids


def test_the_literal_name_of_a_byte_is_not_the_byte(tokenizer: Tokenizer) -> None:
    newline = tokenizer.encode_text("\n")
    assert len(newline) == 1
    assert newline[0] not in tokenizer.encode_text("<0x0A>")


def test_the_sentencepiece_space_reads_as_a_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_text("a▁b") == tokenizer.encode_text("a b")


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_text("a\ud800b\udfff") == tokenizer.encode_text("a\ufffdb\ufffd")


def test_long_texts(tokenizer: Tokenizer) -> None:
    """Megabytes of what is expensive: time in the square of the length would not end."""
    for text in ("hello world " * 80_000, "<" * 300_000, "</think>" * 30_000, "<|LOC_" * 50_000, "h" * 300_000):
        ids = tokenizer.encode_text(text)
        assert text_of(tokenizer, ids) == text.encode()


# -------------------------------------------------------------------------------------------------- trusted templates


def test_a_template_s_control_tokens_are_recognised(tokenizer: Tokenizer) -> None:
    control = tokenizer.control
    text = "<|begin_of_sentence|>Hi\nUser:  Picture 1:<|IMAGE_START|><|IMAGE_END|>?\nAssistant: \n<think>\n"
    assert tokenizer.encode_template(text) == [
        control["<|begin_of_sentence|>"],
        *tokenizer.encode_text("Hi\nUser:  Picture 1:"),
        control["<|IMAGE_START|>"],
        control["<|IMAGE_END|>"],
        *tokenizer.encode_text("?\nAssistant: \n"),
        control["<think>"],
        *tokenizer.encode_text("\n"),
    ]


def test_templates_as_transformers_encodes_them(tokenizer: Tokenizer, judge: LlamaTokenizer) -> None:
    text = "<|begin_of_sentence|>System\nUser: <tool_call>\n<<think>x</think></s><|LOC_1|><|LOC_11|><s"
    assert tokenizer.encode_template(text) == judge.encode(text, add_special_tokens=False)


def test_the_longest_control_token_counts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_template("<|LOC_11|>") == [tokenizer.control["<|LOC_11|>"]]


# ------------------------------------------------------------------------------------------------------ ids and bytes


def test_ids_match_the_configuration(tokenizer: Tokenizer, demo: Path) -> None:
    config = json.loads((demo / "config.json").read_bytes())
    assert tokenizer.token_id("<|IMAGE_PLACEHOLDER|>") == config["im_patch_id"]
    for field in ("image_start", "image_end", "video_start", "video_end"):
        assert tokenizer.control[f"<|{field.upper()}|>"] == config[f"{field}_token_id"]
    assert (tokenizer.control["<unk>"], tokenizer.control["<s>"], tokenizer.control["</s>"]) == (0, 1, 2)
    assert tokenizer.vocab_size == max(tokenizer.control.values()) + 1 <= config["vocab_size"]


def test_both_back_ends_hold_the_same_tokens(from_model: Tokenizer, from_json: Tokenizer) -> None:
    assert from_model.control == from_json.control
    assert from_model.vocab_size == from_json.vocab_size
    assert from_model.special_ids == from_json.special_ids
    for i in range(from_model.vocab_size):
        assert from_model.token_bytes(i) == from_json.token_bytes(i), i


def test_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    for text in VISIBLE:
        assert tokenizer.token_bytes(tokenizer.control[text]) == text.encode()
    for text in ("<s>", "</s>", "<unk>", "<|begin_of_sentence|>", "<|IMAGE_START|>", "<|LOC_3|>", "<mask:1>"):
        assert tokenizer.token_bytes(tokenizer.control[text]) == b""
    newline = tokenizer.token_id("\n")
    assert newline is not None
    assert tokenizer.token_bytes(newline) == b"\n"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(10**9) == b""
    assert tokenizer.special_ids == set(tokenizer.control.values()) - {tokenizer.control[text] for text in VISIBLE}


def test_every_single_byte_is_a_token(tokenizer: Tokenizer) -> None:
    single = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert {bytes([value]) for value in range(256)} <= single


def test_token_id(tokenizer: Tokenizer) -> None:
    for text in (" the", "The", "a", "图片", "</s>", "<think>", " ", "7"):
        found = tokenizer.token_id(text)
        assert found is not None, text
        assert found == tokenizer.control.get(text, found)
        if text not in tokenizer.control:
            assert tokenizer.encode_text(text) == [found]
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.token_id("<0x0A>") is None
    assert tokenizer.token_id("") is None


# ------------------------------------------------------------------------------------------------------ files that vary


def copy(source: Path, target: Path, *without: str) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", *without))
    return target


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))


@pytest.mark.parametrize("name", ["spm.model", "ernie_token_100k.model"])
def test_other_names_of_the_model_file(demo: Path, tmp_path: Path, from_model: Tokenizer, name: str) -> None:
    directory = copy(demo, tmp_path / "renamed")
    (directory / "tokenizer.model").rename(directory / name)
    assert Tokenizer.load(directory).control == from_model.control


def test_the_model_file_goes_before_the_converted_one(demo: Path, tmp_path: Path) -> None:
    directory = copy(demo, tmp_path / "both")
    (directory / "tokenizer.json").write_text("not looked at")
    assert Tokenizer.load(directory).vocab_size > 0


@pytest.mark.parametrize("without", ["added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_one_file_that_lists_the_added_tokens_is_enough(
    demo: Path, tmp_path: Path, from_model: Tokenizer, without: str
) -> None:
    assert Tokenizer.load(copy(demo, tmp_path / "fewer", without)).control == from_model.control


def test_special_tokens_named_without_ids_are_numbered_on(demo: Path, tmp_path: Path, from_model: Tokenizer) -> None:
    """As transformers does, in the order of additional_special_tokens."""
    directory = copy(demo, tmp_path / "named", "added_tokens.json")
    edit(directory / "tokenizer_config.json", added_tokens_decoder={})
    assert Tokenizer.load(directory).control == from_model.control


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("field", ["additional_special_tokens", "extra_special_tokens"])
def test_a_list_of_special_tokens_that_is_null_is_empty(
    demo: Path, tmp_path: Path, from_model: Tokenizer, file: str, field: str
) -> None:
    directory = copy(demo, tmp_path / "null")
    edit(directory / file, **{field: None})
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.control == from_model.control
    assert tokenizer.warnings == (f"{directory / file}: {field} is null; it is taken for empty",)
    assert from_model.warnings == ()


def train(path: Path, **options: Any) -> None:
    """A SentencePiece model that is as unlike the demo's as it may be."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        control_symbols=["<|begin_of_sentence|>", "<|end_of_sentence|>"],
        user_defined_symbols=["<think>", "</think>", "<td>", "0", "1", "2"],
        num_threads=1,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())


def test_the_models_own_prefix_space_is_overruled(demo: Path, tmp_path: Path) -> None:
    directory = copy(demo, tmp_path / "prefix", "added_tokens.json")
    edit(directory / "tokenizer_config.json", added_tokens_decoder={})
    train(directory / "tokenizer.model", add_dummy_prefix=True, normalization_rule_name="identity")
    raw = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert raw.encode("the", out_type=str)[0].startswith("▁")
    tokenizer = Tokenizer.load(directory)
    assert text_of(tokenizer, tokenizer.encode_text("the <s>mill")) == b"the <s>mill"
    edit(directory / "tokenizer_config.json", add_prefix_space=True)
    with pytest.raises(CheckpointError, match="add_prefix_space"):
        Tokenizer.load(directory)


def test_text_that_normalises_to_a_control_token_stays_text(demo: Path, tmp_path: Path) -> None:
    directory = copy(demo, tmp_path / "nfkc", "added_tokens.json")
    edit(directory / "tokenizer_config.json", added_tokens_decoder={})
    train(directory / "tokenizer.model", normalization_rule_name="nfkc")
    wide = "＜think＞"
    raw = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.control["<think>"] in raw.encode(wide)
    ids = tokenizer.encode_text(wide)
    assert tokenizer.control["<think>"] not in ids
    assert text_of(tokenizer, ids) == b"<think>"


def test_user_defined_tags_are_control_and_digits_are_not(demo: Path, tmp_path: Path) -> None:
    directory = copy(demo, tmp_path / "user", "added_tokens.json")
    digits = {"additional_special_tokens": ["0", "1", *json.loads((demo / "added_tokens.json").read_bytes())]}
    edit(directory / "tokenizer_config.json", added_tokens_decoder={}, **digits)
    train(directory / "tokenizer.model", add_dummy_prefix=False, normalization_rule_name="identity")
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.control["<td>"] not in tokenizer.encode_text("<td>")
    assert tokenizer.token_bytes(tokenizer.control["<td>"]) == b"<td>"
    assert not {"0", "1", "2"} & tokenizer.control.keys()
    assert text_of(tokenizer, tokenizer.encode_text("2010")) == b"2010"


@pytest.mark.parametrize("backend", ["demo", "converted"])
def test_an_added_token_that_is_text(request: pytest.FixtureRequest, tmp_path: Path, backend: str) -> None:
    """Not special and not angled: ordinary text, one token."""
    directory = copy(request.getfixturevalue(backend), tmp_path / "text")
    token = {"content": "millrace", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    if backend == "demo":
        config = json.loads((directory / "tokenizer_config.json").read_bytes())
        config["added_tokens_decoder"]["1700"] = {**token, "special": False}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        raw = json.loads((directory / "tokenizer.json").read_bytes())
        raw["added_tokens"].append({**token, "special": False, "id": raw["added_tokens"][-1]["id"] + 1})
        (directory / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(directory)
    added = tokenizer.token_id("millrace")
    assert added == tokenizer.vocab_size - 1
    assert added not in tokenizer.control.values()
    assert tokenizer.token_bytes(added) == b"millrace"
    ids = tokenizer.encode_text("a millrace</think>millrace")
    assert ids.count(added) == 2
    assert text_of(tokenizer, ids) == b"a millrace</think>millrace"


# ------------------------------------------------------------------------------------------------------------ bad files


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff"])
def test_a_model_file_that_is_none(demo: Path, tmp_path: Path, content: bytes) -> None:
    directory = copy(demo, tmp_path / "bad")
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer"):
        Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<a>"}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1600": {}}}', "content"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1600": {"content": "<other>"}}}', "both have id 1600"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"300": {"content": "<other>"}}}', "both have id 300"),
        ("added_tokens.json", '{"<|IMAGE_START|>": 7}', "ids 1640 and 7"),
        ("added_tokens.json", '{"<|IMAGE_START|>": "x"}', "added_tokens"),
    ],
)
def test_bad_added_tokens(demo: Path, tmp_path: Path, file: str, content: str, named: str) -> None:
    directory = copy(demo, tmp_path / "bad")
    (directory / file).write_text(content)
    with pytest.raises(CheckpointError, match=named):
        Tokenizer.load(directory)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_text_with_flags_is_refused(demo: Path, tmp_path: Path, flag: str) -> None:
    directory = copy(demo, tmp_path / "bad")
    config = json.loads((directory / "tokenizer_config.json").read_bytes())
    config["added_tokens_decoder"]["1700"] = {"content": "millrace", flag: True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'millrace' has lstrip, rstrip or single_word"):
        Tokenizer.load(directory)


def test_a_token_the_server_needs_is_missed(demo: Path, tmp_path: Path) -> None:
    directory = copy(demo, tmp_path / "bad", "added_tokens.json", "special_tokens_map.json")
    edit(directory / "tokenizer_config.json", added_tokens_decoder={}, additional_special_tokens=["<|IMAGE_START|>"])
    with pytest.raises(CheckpointError, match=r"no token <\|IMAGE_PLACEHOLDER\|>, <\|IMAGE_END\|>"):
        Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": {"type": "Unigram", "vocab": {}}}, "Unigram"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": False}}, "byte_fallback"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]], "byte_fallback": True}},
            "tokenizer.json",
        ),
        ({"added_tokens": [{"id": 3, "content": "<x>", "special": True}]}, "both have id 3"),
        ({"added_tokens": [{"content": "<x>", "special": True}]}, "no id"),
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, "'a b' are not its text"),
    ],
)
def test_bad_converted_files(converted: Path, tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    directory = copy(converted, tmp_path / "bad")
    edit(directory / "tokenizer.json", **fields)
    with pytest.raises(CheckpointError, match=named):
        Tokenizer.load(directory)
