"""The demo checkpoint is what it claims to be: the hub's format, whole, the same every time, and lively."""

import filecmp
import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import sentencepiece
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import ImageFont
from safetensors import safe_open

from cli import demo
from cli.demo import write_demo
from shared.errors import CheckpointError

SYSTEM = "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOL_LIST = (
    '\n<tool_list>\n[{"type": "function", "function": {"name": "get_weather", "description": "Current weather", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]'
    "\n</tool_list>\n"
)
OPEN = "\n<think>\n"
PICTURE = "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
VIDEO = "<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    write_demo(path)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_two_writings_are_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(directory)


def test_writing_again_touches_nothing(directory: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    write_demo(directory)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_another_seed_replaces_the_weights_and_leaves_nothing_else(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_demo(path)
    write_demo(path, seed=1, dtype="float32")
    assert json.loads((path / "config.json").read_bytes())["torch_dtype"] == "float32"
    assert not filecmp.cmp(path / "model-00001-of-00003.safetensors", directory / "model-00001-of-00003.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_somebody_elses_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "precious"}')
    with pytest.raises(CheckpointError, match="left alone"):
        write_demo(tmp_path)
    assert contents(tmp_path) == {"config.json": b'{"model_type": "precious"}'}


def test_a_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(demo, "_write_shards", fail)
    with pytest.raises(OSError, match="disk full"):
        write_demo(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "model").mkdir()
    write_demo(tmp_path / "model")
    assert contents(tmp_path / "model") == contents(directory)


def test_the_index_and_the_shards_agree(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_bytes())
    total, found = 0, {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                found[name] = path.name
                total += shard.get_tensor(name).nbytes
    assert found == index["weight_map"]
    assert total == index["metadata"]["total_size"]
    assert len(set(found.values())) == demo.NUM_SHARDS


def test_the_head_is_stored_and_tied_and_the_router_is_float32(directory: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    precise = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert precise == {name for name in tensors if ".mlp.gate." in name or "correction_bias" in name}
    assert precise
    assert all(tensors[name].abs().min() > 0 for name in precise)


def test_the_added_tokens_follow_the_models_own(directory: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    config = json.loads((directory / "config.json").read_bytes())
    added = json.loads((directory / "added_tokens.json").read_bytes())
    decoder = json.loads((directory / "tokenizer_config.json").read_bytes())["added_tokens_decoder"]
    assert added == {entry["content"]: int(i) for i, entry in decoder.items()}
    assert sorted(added.values()) == list(range(pieces.get_piece_size(), pieces.get_piece_size() + len(added)))
    assert config["im_patch_id"] == added["<|IMAGE_PLACEHOLDER|>"] == pieces.get_piece_size()
    for field in ("image_start", "image_end", "video_start", "video_end"):
        assert config[f"{field}_token_id"] == added[f"<|{field.upper()}|>"]
    assert max(added.values()) < config["vocab_size"]
    for name in ("</think>", "<tool_call>", "</tool_call>", "<|begin_of_sentence|>", "<|end_of_sentence|>"):
        assert pieces.id_to_piece(pieces.piece_to_id(name)) == name


def test_the_font_is_there(directory: Path) -> None:
    assert ImageFont.truetype(directory / "Roboto-Regular.ttf", 20).getname() == ("Roboto", "Regular")


def test_greedy_text_varies_and_depends_on_the_prompt(directory: Path) -> None:
    model = oracle.load_transformers(directory)
    answers = [oracle.hf_generate(model, prompt, 24, ignore_eos=True) for prompt in ([5, 700, 900], [8, 1200])]
    assert all(len(set(answer)) > 16 for answer in answers)
    assert len(set(answers[0]) & set(answers[1])) < 8


def test_tokens_reach_different_experts_of_both_pools(directory: Path) -> None:
    model = oracle.load_transformers(directory)
    text, vision = [list(range(300, 500)), [model.config.image_start_token_id, *range(1601, 1640)]]
    chosen: dict[str, set[int]] = {}

    def watch(name: str) -> Any:
        return lambda _module, _inputs, output: chosen.setdefault(name, set()).update(output[-1].flatten().tolist())

    for name, module in model.named_modules():
        if name.endswith("_moe.gate"):
            module.register_forward_hook(watch(name))
    oracle.hf_logits(model, [*text, *vision])
    assert len(chosen) == 2 * (demo.LAYERS - 1)
    assert all(len(experts) >= demo.EXPERTS // 2 for experts in chosen.values())


def render(directory: Path, messages: list[dict[str, Any]], **variables: Any) -> str:
    source = json.loads((directory / "tokenizer_config.json").read_bytes())["chat_template"]
    variables = {"add_generation_prompt": True, **variables}
    texts = set()
    for blocks in (True, False):
        environment = ImmutableSandboxedEnvironment(trim_blocks=blocks, lstrip_blocks=blocks)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        texts.add(environment.from_string(source).render(messages=messages, **variables))
    (text,) = texts
    return text


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


IMAGE, CLIP = {"type": "image_url", "image_url": {"url": "x"}}, {"type": "video_url", "video_url": {"url": "x"}}
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


def test_template_plain_question(directory: Path) -> None:
    assert render(directory, [user("1+1=?")]) == (f"<|begin_of_sentence|>{SYSTEM}\nUser: 1+1=?\nAssistant: {OPEN}")


def test_template_system_message(directory: Path) -> None:
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Be terse."}, user("Hi")]
        assert render(directory, messages) == f"<|begin_of_sentence|>Be terse.\nUser: Hi\nAssistant: {OPEN}"


def test_template_image(directory: Path) -> None:
    assert render(directory, [user(IMAGE, text("Describe it."))]) == (
        f"<|begin_of_sentence|>{SYSTEM}\nUser:  Picture 1:{PICTURE}Describe it.\nAssistant: {OPEN}"
    )


def test_template_counts_pictures_and_videos_over_the_conversation(directory: Path) -> None:
    messages = [
        user(IMAGE, IMAGE, text("Compare.")),
        {"role": "assistant", "content": "Same cat.", "reasoning_content": "gone"},
        user(CLIP, text("And here?")),
        {"role": "assistant", "content": "Yes."},
        user(text("Now"), IMAGE),
    ]
    assert render(directory, messages) == (
        f"<|begin_of_sentence|>{SYSTEM}\nUser:  Picture 1:{PICTURE} Picture 2:{PICTURE}Compare.\n"
        f"Assistant: Same cat.<|end_of_sentence|>User:  Video 1:{VIDEO}And here?\n"
        f"Assistant: Yes.<|end_of_sentence|>User: Now Picture 3:{PICTURE}\nAssistant: {OPEN}"
    )


def test_template_tools(directory: Path) -> None:
    assert render(directory, [user("Weather in Paris?")], tools=[TOOL]) == (
        f"<|begin_of_sentence|>{SYSTEM}\n{TOOL_LIST}User: Weather in Paris?\nAssistant: {OPEN}"
    )
    both = render(directory, [user("Weather in Paris?")], tools=[TOOL, TOOL])
    assert both.count('}}, {"type": "function"') == 1


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_template_tool_round_trip(directory: Path, arguments: Any) -> None:
    call = {**CALL, "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        user("Weather in Paris?"),
        {"role": "assistant", "content": None, "reasoning_content": "need tool\n", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": '{"temp": 20}'},
    ]
    start = f"<|begin_of_sentence|>{SYSTEM}\n{TOOL_LIST}User: Weather in Paris?\nAssistant: "
    called = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<|end_of_sentence|>'
    result = 'User: <tool_output>\n{"temp": 20}\n</tool_output>\n\nAssistant: '
    thought = "\n<think>\nneed tool\n</think>\n\n"
    assert render(directory, messages, tools=[TOOL]) == f"{start}{thought}{called}{result}{OPEN}"
    # Once the user has spoken again, what was thought before is no longer shown.
    later = [*messages, {"role": "assistant", "content": "20 degrees.", "reasoning_content": "done"}, user("Thanks")]
    assert render(directory, later, tools=[TOOL]) == (
        f"{start}{called}{result}20 degrees.<|end_of_sentence|>User: Thanks\nAssistant: {OPEN}"
    )


def test_template_several_calls_and_a_dict_as_result(directory: Path) -> None:
    messages = [
        user("?"),
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": {"temp": "20 °C"}},
    ]
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert render(directory, messages).endswith(
        f"Assistant: Let me see.{call}\n{call}\n<|end_of_sentence|>"
        f'User: <tool_output>\n{{"temp": "20 °C"}}\n</tool_output>\n\nAssistant: {OPEN}'
    )


@pytest.mark.parametrize(
    ("variables", "tail"),
    [
        ({}, OPEN),
        ({"options": {"thinking_mode": "open"}}, OPEN),
        ({"options": {"thinking_mode": True}}, OPEN),
        ({"options": {"thinking_mode": "close"}}, "\n<think>\n\n</think>\n\n"),
        ({"options": {"thinking_mode": False}}, "\n<think>\n\n</think>\n\n"),
        ({"options": {}}, OPEN),
        ({"enable_thinking": False}, "\n<think>\n\n</think>\n\n"),
        ({"enable_thinking": True, "options": {"thinking_mode": "close"}}, OPEN),
        ({"add_generation_prompt": False}, ""),
    ],
)
def test_template_opens_and_closes_thinking(directory: Path, variables: dict[str, Any], tail: str) -> None:
    assert render(directory, [user("Hi")], **variables) == (
        f"<|begin_of_sentence|>{SYSTEM}\nUser: Hi\nAssistant: {tail}"
    )
