"""Structural tags: free text with parts that must follow a grammar, in the forms that vLLM, SGLang and xgrammar have.

`{"format": ...}` is the present form, a tree of the structs below; `{"structures": ..., "triggers": ...}` is the older
one. Each becomes a grammar in Lark's notation. Where the text of a tag has a control token, as `<tool_call>` is, the
grammar has that token and not its spelling.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from shared.grammar import forms
from shared.grammar.forms import Rule

TEXT = r"/(.|\n)*/"

Json = dict[str, Any] | bool


class Form(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of the formats."""


class ConstString(Form, frozen=True, tag="const_string"):
    value: str


class JsonText(Form, frozen=True, tag="json_schema"):
    json_schema: Json


class Regex(Form, frozen=True, tag="regex"):
    pattern: str


class ContextFree(Form, frozen=True, tag="grammar"):
    grammar: str


class AnyText(Form, frozen=True, tag="any_text"):
    """Text up to the end of the tag around it, or of the answer."""


class InOrder(Form, frozen=True, tag="sequence"):
    elements: list["Format"]


class OneOf(Form, frozen=True, tag="or"):
    elements: list["Format"]


class Tag(Form, frozen=True, tag="tag"):
    begin: str
    content: "Format"
    end: str


class TriggeredTags(Form, frozen=True, tag="triggered_tags"):
    """Free text in which a trigger begins one of the tags whose `begin` starts with it."""

    triggers: list[str]
    tags: list[Tag]
    at_least_one: bool = False
    stop_after_first: bool = False


class SeparatedTags(Form, frozen=True, tag="tags_with_separator"):
    tags: list[Tag]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


Format = ConstString | JsonText | Regex | ContextFree | AnyText | InOrder | OneOf | Tag | TriggeredTags | SeparatedTags


class Structure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tag of the older form, around JSON."""

    begin: str
    schema: Json
    end: str


class _Present(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Format
    type: str = "structural_tag"


class _Older(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    structures: list[Structure]
    triggers: list[str]
    type: str = "structural_tag"


def read(given: Mapping[str, Any]) -> Format:
    """Return the format of a structural tag of either form.

    Raises:
        ValueError: it has neither form; the message names the place.
    """
    if "structures" not in given:
        return msgspec.convert(given, _Present).format
    older = msgspec.convert(given, _Older)
    tags = [Tag(each.begin, JsonText(each.schema), each.end) for each in older.structures]
    return TriggeredTags(older.triggers, tags)


def write(top: Format, control: Mapping[str, int], thinking: bool, otherwise: Rule | None = None) -> str:
    """Return the text of `Grammar`.

    Args:
        control: control tokens, by their text.
        thinking: the grammar begins after </think>.
        otherwise: a rule that the answer may follow in place of `top`.

    Raises:
        ValueError: the format contradicts itself.
    """
    writer = _Writer(control)
    either = "" if otherwise is None else f"{writer.part(otherwise)} | "
    writer.rules.append(f"start: {either}{writer.body(top, '')}")
    return forms.write({"lark_grammar": "\n".join(reversed(writer.rules)) + "\n"}, thinking, writer.parts)


class _Writer:
    """Rules of one grammar, under construction."""

    def __init__(self, control: Mapping[str, int]) -> None:
        self._control = control
        self._split = re.compile("(" + "|".join(re.escape(text) for text in sorted(control, reverse=True)) + ")")
        self.rules: list[str] = [f"TEXT: {TEXT}"]
        self.parts: dict[str, Rule] = {}

    def body(self, form: Format, end: str) -> str:
        """Return the right side of a rule: what `form` allows, and `end` after it."""
        if isinstance(form, AnyText):
            return self._text_until(end)
        return f"{self._bare(form)} {self._literal(end)}".strip()

    def _bare(self, form: Format) -> str:
        match form:
            case ConstString(value):
                return self._literal(value)
            case JsonText(schema):
                return self.part(forms.json_schema(schema))
            case Regex(pattern):
                return self.part(forms.regex(pattern))
            case ContextFree(grammar):
                return self.part(forms.context_free(grammar))
            case AnyText():
                raise ValueError("any_text must be the whole content of its tag, or the last of a sequence")
            case InOrder(elements):
                return " ".join([*map(self._bare, elements[:-1]), *(self.body(last, "") for last in elements[-1:])])
            case OneOf(elements):
                return self._one_of([self.body(element, "") for element in elements])
            case Tag(begin, content, end):
                return f"{self._literal(begin)} {self.body(content, end)}"
            case TriggeredTags():
                return self._triggered(form)
            case SeparatedTags():
                return self._separated(form)

    def _triggered(self, form: TriggeredTags) -> str:
        groups = {trigger: [tag for tag in form.tags if tag.begin.startswith(trigger)] for trigger in form.triggers}
        for tag in form.tags:
            if not any(tag in group for group in groups.values()):
                raise ValueError(f"no trigger begins the tag {tag.begin!r}")
        one = self._one_of([self._triggered_by(trigger, group) for trigger, group in groups.items() if group])
        if form.stop_after_first:
            return one if form.at_least_one else self._one_of([one, "TEXT"])
        return f"{one}{'+' if form.at_least_one else '*'} TEXT"

    def _triggered_by(self, trigger: str, tags: Sequence[Tag]) -> str:
        rests = [f"{self._literal(tag.begin[len(trigger) :])} {self.body(tag.content, tag.end)}" for tag in tags]
        return f"{self._text_until(trigger)} {self._one_of(rests)}"

    def _separated(self, form: SeparatedTags) -> str:
        one = self._one_of([self._bare(tag) for tag in form.tags])
        more = "" if form.stop_after_first else f" ({self._literal(form.separator)} {one})*"
        return f"({one}{more}){'' if form.at_least_one else '?'}"

    def _text_until(self, end: str) -> str:
        """Return text that ends where `end` first occurs."""
        literal = self._literal(end)
        if not literal or literal.startswith("<"):
            return f"TEXT {literal}".strip()
        return self._rule(f"TEXT {literal}", "[lazy]")

    def _one_of(self, bodies: Sequence[str]) -> str:
        if not bodies:
            raise ValueError("a list of tags, elements or triggers is empty")
        return "(" + " | ".join(bodies) + ")"

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def part(self, rule: Rule) -> str:
        """Return the name by which a rule of its own can stand in another."""
        name = f"part_{len(self.parts)}"
        self.parts[name] = rule
        return f"@{name}"

    def _literal(self, text: str) -> str:
        """Return text as strings and control tokens."""
        pieces = self._split.split(text) if self._control else [text]
        shown = (
            json.dumps(each, ensure_ascii=False) if i % 2 == 0 else f"<[{self._control[each]}]>"
            for i, each in enumerate(pieces)
            if each
        )
        return " ".join(shown)
