"""Tokenizer of the demo checkpoint: a small SentencePiece model, its added tokens and its chat template."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

# Stored in the SentencePiece model itself, as in the published checkpoint; control pieces never come out of text
# there, user-defined ones do.
CONTROL_PIECES = ("<|end_of_sentence|>", "<|begin_of_sentence|>", "<mask:1>", "<mask:7>")
USER_DEFINED_PIECES = ("<think>", "</think>", "<tool_call>", "</tool_call>")
NUM_PIECES = 1600
NUM_LOCATIONS = 32

# Ids that follow the SentencePiece model's, in this order and without a gap.
ADDED_TOKENS = (
    "<|IMAGE_PLACEHOLDER|>",
    "<|AUDIO_PLACEHOLDER|>",
    *(f"<|LOC_{n}|>" for n in range(NUM_LOCATIONS)),
    "<|LOC_BEGIN|>",
    "<|LOC_END|>",
    "<|LOC_SEP|>",
    "<|CROP_COL_SEP|>",
    "<|CROP_ROW_SEP|>",
    "<|IMAGE_SEP|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
)

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
}

# The prompt format that the model was trained on. Tags trim all white space around them, so that the text does not
# depend on trim_blocks and lstrip_blocks.
CHAT_TEMPLATE = r"""
{%- set default_system = 'You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework.' -%}
{%- set ns = namespace(images=0, videos=0, last_user=-1) -%}
{%- if enable_thinking is defined -%}
    {%- set thinking = enable_thinking -%}
{%- elif options is defined and options.thinking_mode is defined -%}
    {%- set thinking = options.thinking_mode in ['open', 'true', true] -%}
{%- else -%}
    {%- set thinking = true -%}
{%- endif -%}
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is mapping -%}
        {{- content | tojson -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type in ['image', 'image_url'] -%}
                {%- set ns.images = ns.images + 1 -%}
                {{- ' Picture ' ~ ns.images ~ ':<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>' -}}
            {%- elif part.type in ['video', 'video_url'] -%}
                {%- set ns.videos = ns.videos + 1 -%}
                {{- ' Video ' ~ ns.videos ~ ':<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set ns.last_user = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{{- '<|begin_of_sentence|>' -}}
{%- if messages and messages[0].role in ['system', 'developer'] -%}
    {{- text_of(messages[0].content) ~ '\n' -}}
{%- else -%}
    {{- default_system ~ '\n' -}}
{%- endif -%}
{%- if tools -%}
    {{- '\n<tool_list>\n[' -}}
    {%- for tool in tools -%}
        {{- (', ' if not loop.first else '') ~ (tool | tojson) -}}
    {%- endfor -%}
    {{- ']\n</tool_list>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role in ['system', 'developer'] -%}
        {%- if not loop.first -%}
            {{- text_of(message.content) ~ '\n' -}}
        {%- endif -%}
    {%- elif message.role == 'user' -%}
        {{- 'User: ' ~ text_of(message.content) ~ '\nAssistant: ' -}}
    {%- elif message.role == 'tool' -%}
        {{- 'User: <tool_output>\n' ~ text_of(message.content) ~ '\n</tool_output>\n\nAssistant: ' -}}
    {%- elif message.role == 'assistant' -%}
        {%- if message.reasoning_content and message.tool_calls and loop.index0 > ns.last_user -%}
            {{- '\n<think>\n' ~ message.reasoning_content.strip('\n') ~ '\n</think>\n\n' -}}
        {%- endif -%}
        {{- text_of(message.content) -}}
        {%- if message.tool_calls -%}
            {%- for call in message.tool_calls -%}
                {%- set arguments = call.function.arguments -%}
                {{- '\n' if not loop.first else '' -}}
                {{- '<tool_call>\n{"name": ' ~ (call.function.name | tojson) ~ ', "arguments": ' -}}
                {{- (arguments if arguments is string else (arguments | tojson)) ~ '}\n</tool_call>' -}}
            {%- endfor -%}
            {{- '\n' -}}
        {%- endif -%}
        {{- '<|end_of_sentence|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt is not defined or add_generation_prompt -%}
    {{- '\n<think>\n' if thinking else '\n<think>\n\n</think>\n\n' -}}
{%- endif -%}
""".strip("\n")  # noqa: E501

CORPUS = """
A mill race is the channel that leads water to the wheel. The water comes from the river above the weir, runs along the
race, falls on the paddles, and goes back to the river below. The miller opens the gate in the morning and closes it at
night; when the river is high he lets the rest of the water run over the spillway, so that the wheel turns evenly.
What is in this picture? Describe the image. How many people are there? What colour is the car? Read the text.
The picture shows a street in the rain with two people under a red umbrella. On the left there is a shop with a green
door; on the right a yellow bicycle leans against the wall. The sign above the door says "Open". It is evening.
The video shows a child who throws a ball to a dog. The dog runs, jumps and catches it. At the end they walk home.
First I need to look at the image. Then I should think about the question. The user asks for the number of boats, so I
count them one by one: one, two, three, four. There are four boats on the lake, and one more behind the trees.
Let me check the answer again. If x + 3 = 7 then x = 4. The area of a square with side 5 is 25. 12 * 12 = 144.
The answer is 42. The result is 3.14159. In 1969 people walked on the moon. The train leaves at 08:45, arrives at 17:30.
Can you compare these two pictures? Both show the same cat, but in the second one the cat is asleep on the sofa.
I do not know. I am not sure. It depends on the weather. Yes, of course. No, thank you. Please try again later.
Weather in Paris? The weather in Paris is sunny with a temperature of 20 degrees. In London it will rain tomorrow.
You are a helpful assistant. You are a multimodal AI assistant called ERNIE developed by Baidu based on the framework.
User: Hello, how are you? Assistant: I am fine, thank you. What can I do for you today? User: Tell me a short story.
Once upon a time there was a small river that wanted to see the sea. It asked the clouds and they said: follow us.
So the river ran through the fields, under the bridges, past the mill and the town, until the water tasted of salt.
{"type": "function", "function": {"name": "get_weather", "description": "Current weather", "parameters": {}}}
{"name": "get_weather", "arguments": {"city": "Paris"}} {"name": "search", "arguments": {"query": "news", "limit": 10}}
def add(a, b): return a + b; for i in range(10): print(i); if x > 0: x = x - 1; else: break; while True: pass
import json; class Queue: def __init__(self, size): self.items = []; self.size = size; return None; # a comment
The engine reads a request, runs the model, and writes one token after another until the answer is complete.
Every service can be stopped and started again; the tokens that were written are not lost, and none is shown twice.
Das Wasser fließt durch den Kanal zur Mühle. Der Müller öffnet das Tor am Morgen und schließt es am Abend.
L'eau coule dans le canal jusqu'au moulin. Le meunier ouvre la porte le matin et la ferme le soir. Où est la gare ?
El agua corre por el canal hasta el molino. ¿Qué hay en esta imagen? Hay dos niños y un perro en la playa.
Вода течёт по каналу к мельнице. Что на этой картинке? На картинке изображены два человека под красным зонтом.
这张图片里有什么？图片中有两个人，他们在雨中撑着一把红色的伞。左边有一家商店，右边有一辆黄色的自行车。
请描述这张图片。请比较这两张图片。视频中有一个孩子把球扔给一只狗，狗跑过去接住了球。最后他们一起回家了。
首先我需要看一下图片，然后思考用户的问题。湖上有四条船，树后面还有一条。所以答案是五条船。
今天天气怎么样？巴黎今天天气晴朗，气温二十度。伦敦明天会下雨。谢谢你的帮助。不客气，再见。
水从河里流到水渠，推动水车，然后流回河里。磨坊主早上打开闸门，晚上关上闸门。
写一个故事：从前有一条小河，它想看看大海。它问云，云说：跟我们来吧。小河穿过田野，流过桥下，流向大海。
水は川から水路を通って水車へ流れます。この写真には何が写っていますか。二人の人が赤い傘をさしています。
""".strip()


def train_sentencepiece() -> bytes:
    """Train and return the model file: BPE with byte fallback, single digits, no prefix, no normalisation.

    It is deterministic: the same bytes every time.
    """
    return train_pieces(iter(CORPUS.splitlines()), NUM_PIECES)


def train_pieces(sentences: Iterator[str], num_pieces: int) -> bytes:
    """Return a SentencePiece model of so many pieces, with the published one's kind, options and control pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=list(CONTROL_PIECES),
        user_defined_symbols=list(USER_DEFINED_PIECES),
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(directory: Path, model: bytes | None = None, num_pieces: int = NUM_PIECES) -> None:
    """Write tokenizer.model, tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    `model` is a SentencePiece model of `num_pieces` pieces; without one, it is trained on `CORPUS`.
    """
    (directory / "tokenizer.model").write_bytes(train_sentencepiece() if model is None else model)
    added = {text: num_pieces + i for i, text in enumerate(ADDED_TOKENS)}
    special = {**SPECIAL_TOKENS, "additional_special_tokens": list(ADDED_TOKENS)}
    write_json(directory / "added_tokens.json", added)
    write_json(directory / "special_tokens_map.json", special)
    write_json(
        directory / "tokenizer_config.json",
        {
            **special,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): _added_token(text) for text, i in added.items()},
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
            "tokenizer_class": "Ernie4_5_VLTokenizer",
        },
    )


def write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8, as the hub's files are."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _added_token(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **flags, "special": True}
