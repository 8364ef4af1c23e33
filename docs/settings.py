"""Writer of settings.md: every setting with its default, unit, flag, key of the chart and meaning.

The one source of each is the code that reads it: fields of the settings structs and the comments beside them, the flags
of `millrace serve`, the chart's values.yaml. Run it from the repository's root after one has changed:
python docs/settings.py
"""

import argparse
import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "helm")]

from values_schema import COMMON, OF_ONE_SERVICE, OWNED, SERVICES  # noqa: E402

from cli.autoscaler.policy import Rules  # noqa: E402
from cli.autoscaler.settings import AutoscalerSettings  # noqa: E402
from cli.flags import VARIABLES, flags  # noqa: E402
from services.engine.settings import SpeculativeConfig  # noqa: E402
from services.mm_encoder.media.processor_settings import ProcessorSettings  # noqa: E402
from shared.config import CommonSettings  # noqa: E402

TARGET = ROOT / "docs" / "settings.md"
VALUES = ROOT / "helm" / "values.yaml"

# A setting's unit, by how its name ends; the longest of these endings decides.
ENDINGS = {
    "s": ("_s", "_seconds"),
    "ms": ("_ms",),
    "bytes": ("_bytes",),
    "characters": ("_chars",),
    "pixels": ("_pixels",),
    "patches": ("_patches",),
    "frames": ("_frames",),
    "frames/s": ("_fps",),
    "tokens": ("_tokens", "_model_len", "block_size", "journal_every"),
    "blocks": ("_blocks_override",),
    "sequences": ("_num_seqs",),
    "steps": ("read_count", "trim_every"),
    "requests": ("concurrency", "_queue"),
    "messages": ("_max_len",),
    "deliveries": ("_deliveries",),
    "threads": ("_threads",),
    "redirects": ("_redirects",),
    "port": ("port",),
}
# The chart's values that a setting is made of, where it is no key of a `settings` map.
CHART = {
    "redis_url": "`redis.*`",
    "blob_redis_url": "`redis.external.blobUrl`",
    "model": "`model.*`",
    "name": "the pod's name",
    "namespace": "`settings.namespace`",
    "metrics_port": "8181",
    "metrics_host": "0.0.0.0",
    "drain_s": "`SERVICE.drainSeconds`",
    "host": "0.0.0.0",
    "port": "8180",
    "served_model_names": "`model.name`",
    "api_keys": "`apiKeys`",
    "api_keys_file": "`apiKeysFile.*`",
    "device": "`SERVICE.gpus`",
    "crash_at": "",
    "listen_fd": "",
}
HEADER = """# Settings

Written by `python docs/settings.py` out of the code; a test fails when it is not current.

Each service reads its settings from its environment: `max_model_len` from `MILLRACE_MAX_MODEL_LEN`. Text stands as it
is, every other type is JSON (`4096`, `true`, `{"image": 100}`). `millrace serve` sets these variables from its flags
and passes on the ones that are set already; the chart sets them from its values. An unknown flag, variable or value is
an error that names it.
"""


class Row(NamedTuple):
    name: str
    default: str
    unit: str
    flag: str
    chart: str
    meaning: str


class Undescribed(Exception):
    """Error of a setting without a comment that says what it is."""


def comments(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Return each field's comment: the one in its lines, or else the one in lines of its own above it."""
    lines = inspect.getsource(inspect.getmodule(struct)).splitlines()  # type: ignore[arg-type]
    notes = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    [body] = [
        node.body
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, ast.ClassDef) and node.name == struct.__name__
    ]
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert node.end_lineno is not None
            beside = [notes[number][0] for number in range(node.lineno, node.end_lineno + 1) if number in notes]
            above: list[str] = []
            number = node.lineno - 1
            while number in notes and notes[number][1]:
                above.insert(0, notes[number][0])
                number -= 1
            found[node.target.id] = " ".join(beside or above)
    return found


def rows(struct: type[msgspec.Struct], chart: str | None, skip: Sequence[str] = ()) -> list[Row]:
    """Return one row a field. `chart`: the service whose values hold them, "" for all services, None outside the chart.

    Raises:
        Undescribed: a field has no comment.
    """
    told, given = comments(struct), flag_names()
    made = []
    for field in msgspec.structs.fields(struct):
        if field.name in skip:
            continue
        if not told.get(field.name):
            raise Undescribed(f"{struct.__module__}.{struct.__name__}.{field.name} needs a comment beside it")
        flag = "" if chart is None else given.get(field.name, "")
        made.append(
            Row(field.name, default(field), unit(field.name), flag, chart_key(field.name, chart), told[field.name])
        )
    return made


def default(field: msgspec.structs.FieldInfo) -> str:
    """Return a field's default as a person writes it; "required" where there is none."""
    if field.default_factory is not msgspec.NODEFAULT:
        value: Any = field.default_factory()
    elif field.default is not msgspec.NODEFAULT:
        value = field.default
    else:
        return "required"
    if value is None or value is msgspec.UNSET:
        return "unset"
    if isinstance(value, msgspec.Struct):
        return "below"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    return f"`{msgspec.json.encode(value).decode()}`"


def unit(name: str) -> str:
    """Return what a setting is counted in, or "" where its name does not say."""
    fitting = [(len(end), counted) for counted, ends in ENDINGS.items() for end in ends if name.endswith(end)]
    return max(fitting)[1] if fitting else ""


def chart_key(name: str, chart: str | None) -> str:
    if chart is None:
        return ""
    if name in OWNED:
        return CHART[name].replace("SERVICE", chart or "SERVICE")
    if not chart and name in OF_ONE_SERVICE:
        return f"`settings.{name}`, `SERVICE.settings.{name}`"
    return f"`{chart}.settings.{name}`" if chart else f"`settings.{name}`"


def flag_names() -> dict[str, str]:
    """Return each setting's flag of `millrace serve`, and the variable of FastDeploy's that does the same."""
    names = {action.dest: f"`{action.option_strings[0]}`" for action in flags()}
    for variable, setting in VARIABLES.items():
        names[setting] = ", ".join([*([names[setting]] if setting in names else []), f"`{variable}`"])
    return names


def other_flags() -> list[tuple[str, str, str]]:
    """Return the flags that are no setting of a service: (flag, default, help)."""
    settings = {name for struct in SERVICES.values() for name in struct.__struct_fields__}
    return [
        (
            action.option_strings[0],
            f"`{action.default}`" if action.default not in (None, False, argparse.SUPPRESS) else "",
            (action.help or "") % {"default": action.default},
        )
        for action in flags()
        if action.dest not in settings
    ]


def values(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, comment) of each value of the chart that is not a map of others."""
    path: list[tuple[int, str]] = []
    lines = text.splitlines()
    for place, line in enumerate(lines):
        if not (match := re.fullmatch(r"( *)(\w+):(?: +([^#\s].*?))?(?: +# (.*))?", line)):
            continue
        indent, key, value, comment = match.groups()
        path = [*(each for each in path if each[0] < len(indent)), (len(indent), key)]
        if value is not None:
            yield ".".join(name for _, name in path), value, comment or _above(lines[:place])


def _above(lines: Sequence[str]) -> str:
    """Return the comment that these lines end in."""
    found: list[str] = []
    for each in reversed(lines):
        if not each.lstrip().startswith("# "):
            break
        found.insert(0, each.lstrip("# "))
    return " ".join(found)


def chart_rows() -> list[tuple[str, str, str]]:
    """Return the chart's values; a service's key without a comment means what it means to the first that has one.

    Raises:
        Undescribed: a value has no comment.
    """
    made = []
    meanings: dict[str, str] = {}
    for key, value, comment in values(VALUES.read_text(encoding="utf-8")):
        top, _, name = key.partition(".")
        if top in SERVICES or top == "pods":
            comment = comment or meanings.get(name, "")
            meanings.setdefault(name, comment)
        if not comment:
            raise Undescribed(f"helm/values.yaml: {key} needs a comment beside it")
        made.append((f"`{key}`", f"`{value}`", comment))
    return made


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table without the columns that are empty in every line."""
    kept = [place for place in range(len(head)) if any(line[place] for line in lines)]
    cells = [[head[place] for place in kept], ["---"] * len(kept)]
    cells += [[line[place].replace("|", "\\|") for place in kept] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def section(title: str, note: str, struct: type[msgspec.Struct], chart: str | None, skip: Sequence[str] = ()) -> str:
    made = [row._replace(name=f"`{row.name}`") for row in rows(struct, chart, skip)]
    return f"## {title}\n\n{note}\n\n" + table(("setting", "default", "unit", "flag", "chart", "meaning"), made)


def text() -> str:
    common = sorted(COMMON)
    parts = [
        HEADER,
        section("All services", "Of `shared/config.py`. `SERVICE` is any of the four.", CommonSettings, ""),
        *(
            section(service, f"Of `services/{service}/settings.py`, besides those of all.", struct, service, common)
            for service, struct in SERVICES.items()
        ),
        section("speculative_config", "vLLM's and FastDeploy's keys, of one JSON object.", SpeculativeConfig, None),
        section("mm_processor_kwargs", "FastDeploy's keys, of one JSON object.", ProcessorSettings, None),
        "## Flags of `millrace serve` that are no setting of a service\n\n"
        + table(("flag", "default", "meaning"), [(f"`{name}`", given, told) for name, given, told in other_flags()]),
        section(
            "autoscaler",
            "Of `cli/autoscaler/settings.py`; the chart makes them of its values.",
            AutoscalerSettings,
            None,
        ),
        section("Rules of a stage", "Of the autoscaler's `stages`: an object of these for each service.", Rules, None),
        "## Values of the chart\n\nOf `helm/values.yaml`. A service may have any key of `pods`, for its own pods.\n\n"
        + table(("value", "default", "meaning"), chart_rows()),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
