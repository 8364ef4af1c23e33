"""Flags of `millrace serve`: FastDeploy's names with FastDeploy's meanings, read into one frozen value.

A flag that is a service's setting is stored under the setting's own name (shared/config.py, services/*/settings.py)
and goes, untranslated, to every service that has the setting. One that was not given sets nothing, so that defaults
live in one place, the settings.
"""

import argparse
import ipaddress
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from shared.errors import ConfigError

PARSER = "ernie-45-vl-thinking"
DEMO = Path("demo")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# FastDeploy's other flags: known and not supported yet, which deserves another message than "no such flag".
_NOT_YET = """
    revision tokenizer tokenizer-base-url controller-port max-waiting-time timeout timeout-graceful-shutdown
    enable-mm-output data-parallel-size enable-expert-parallel kv-cache-ratio
    static-decode-blocks prealloc-dec-block-slot-num-threshold swap-space max-num-partial-prefills
    max-long-partial-prefills long-prefill-token-threshold max-encoder-cache max-processor-cache tool-parser-plugin
    chat-template load-choices graph-optimization-config guided-decoding-backend
    guided-decoding-disable-any-whitespace max-logprobs logprobs-mode
    logits-processors enable-early-stop early-stop-config lm_head-fp32 seed dynamic-load-weight
    disable-custom-all-reduce splitwise-role ips use-warmup router enable-eplb cache-queue-port config
"""
NOT_YET = frozenset(f"--{name}" for name in _NOT_YET.split())
# FastDeploy's environment variables that mean something here, and the settings that they are.
VARIABLES = {"FD_SAMPLING_CLASS": "sampling_class", "FD_API_KEY": "api_keys"}
# Values of FD_SAMPLING_CLASS: both draw the same tokens, "rejection" without sorting. FastDeploy has others.
SAMPLING_CLASSES = ("base", "rejection")


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Request to run one `millrace serve`."""

    model: Path
    demo: bool
    host: str
    port: int
    metrics_port: int
    gateways: int  # processes that take requests
    redis_url: str | None  # None: start one of our own
    redis_dir: Path | None  # where our own keeps its data; None: where it is gone when we end
    settings: dict[str, Any]  # by the name of the setting; only what was given


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> Launch:
    """Parse the arguments after `serve` and FastDeploy's environment variables.

    Raises:
        ConfigError: a flag or variable is unknown, malformed or not supported; the message names it.
    """
    given, unknown = _parser().parse_known_args([_dashed(argument) for argument in arguments])
    if unknown:
        raise ConfigError(_why_unknown(unknown[0]))
    settings = vars(given)
    launch = {name: settings.pop(name) for name in Launch.__struct_fields__ if name not in ("settings", "model")}
    model = settings.pop("model") or DEMO
    if "FD_SAMPLING_CLASS" in environ:
        settings["sampling_class"] = _sampling_class(environ["FD_SAMPLING_CLASS"])
    if keys := [key for key in environ.get("FD_API_KEY", "").split(",") if key]:
        settings.setdefault("api_keys", keys)
    return Launch(model=model, settings=settings, **launch)


def unread_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the environment variables of FastDeploy that are set and that nothing here reads."""
    return sorted(name for name in environ if name.startswith("FD_") and name not in VARIABLES)


def flags() -> list[argparse.Action]:
    """Return every flag but --help."""
    return [action for action in _parser()._actions if action.dest != "help"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="millrace serve",
        description="Run Redis and the four services on this machine.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=_directory, default=None, metavar="DIR", help="the checkpoint, in the hub's layout"
    )
    what.add_argument(
        "--demo", action="store_true", default=False, help=f"a small random checkpoint, written to ./{DEMO} if absent"
    )
    parser.add_argument(
        "--served-model-name",
        dest="served_model_names",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="what clients may call the model, and nothing else (unset: anything)",
    )

    listen = parser.add_argument_group("where it listens")
    listen.add_argument("--host", default="0.0.0.0", help="address of the API (%(default)s)")
    listen.add_argument("--port", type=_port, default=8180, metavar="PORT", help="the API (%(default)s)")
    listen.add_argument(
        "--metrics-port", type=_port, default=8181, metavar="PORT", help="GET /metrics of all services (%(default)s)"
    )
    listen.add_argument(
        "--gateways",
        "--workers",
        type=_count(1, 64),
        default=1,
        metavar="N",
        help="processes that take requests, all at --port; limits of requests are each one's (%(default)s)",
    )
    listen.add_argument(
        "--engine-worker-queue-port",
        action=_Accept,
        type=_port,
        metavar="PORT",
        help="taken and not needed: work goes through Redis, by a socket that this user alone can open",
    )
    redis = listen.add_mutually_exclusive_group()
    redis.add_argument("--redis-url", default=None, metavar="URL", help="use this Redis instead of starting one")
    redis.add_argument(
        "--redis-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="where the embedded Redis keeps its data, so that what was under way goes on after a restart of all "
        "(unset: it outlives the death of Redis, but not our end)",
    )
    listen.add_argument(
        "--api-key", dest="api_keys", action="append", metavar="KEY", help="required of clients; repeatable"
    )
    listen.add_argument(
        "--api-keys-file",
        type=_file,
        metavar="FILE",
        help="keys with names, weights and limits, as JSON (docs/tenants.md); read again when it changes",
    )
    listen.add_argument(
        "--allowed-origins",
        type=_json(list[str]),
        metavar="JSON",
        help='web pages that browsers may call the API from: ["https://chat.example.org"], or ["*"] (none)',
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-model-len", type=_count(1), metavar="TOKENS", help="the most of prompt and answer together"
    )
    limits.add_argument("--max-num-seqs", type=_count(1, 256), metavar="N", help="sequences in one batch, 1 to 256")
    limits.add_argument(
        "--max-num-batched-tokens",
        type=_count(0),
        metavar="TOKENS",
        help="tokens in one step (0: by device, 512 on a CPU, 2048 on a small GPU, else 8192)",
    )
    limits.add_argument(
        "--max-concurrency", type=_count(1), metavar="N", help="requests answered at once; more get a 429"
    )
    limits.add_argument("--max-queue", type=_count(1), metavar="N", help="requests waiting and running; more get a 429")
    limits.add_argument(
        "--max-num-queued-tokens",
        type=_count(1),
        metavar="TOKENS",
        help="of prompts whose answer has not begun; more get a 429 (unset: no limit)",
    )
    limits.add_argument(
        "--request-timeout",
        dest="request_timeout_s",
        type=_seconds(zero=False),
        metavar="SECONDS",
        help="until an answer must be complete; later it is a 504",
    )
    limits.add_argument(
        "--retain-seconds",
        dest="retain_s",
        type=_seconds(zero=True),
        metavar="SECONDS",
        help="how long a finished answer can be read again; 0: not at all",
    )
    limits.add_argument(
        "--gpu-memory-utilization",
        type=_share,
        metavar="SHARE",
        help="of the GPU's memory that an engine may use, to 1",
    )

    media = parser.add_argument_group("images and videos")
    media.add_argument(
        "--limit-mm-per-prompt",
        type=_json(dict[str, int]),
        metavar="JSON",
        help='the most in a conversation; unset: {"image": 100, "video": 100}',
    )
    media.add_argument(
        "--mm-processor-kwargs", type=_json(dict[str, Any]), metavar="JSON", help='{"image_max_pixels": 12845056}'
    )
    media.add_argument(
        "--media-allow-network",
        dest="media_allow_networks",
        action="append",
        type=_network,
        metavar="CIDR",
        help="let media URLs reach this network although it is not global; repeatable",
    )

    traces = parser.add_argument_group("traces")
    traces.add_argument(
        "--otlp-endpoint", metavar="URL", help="an OpenTelemetry collector, http://HOST:4318 (unset: none)"
    )
    traces.add_argument(
        "--trace-ratio",
        type=_ratio,
        metavar="SHARE",
        help="of the traces that begin here, 0 to 1 (1); callers decide on their own",
    )

    engine = parser.add_argument_group("the engine and the answer")
    engine.add_argument(
        "--tensor-parallel-size",
        type=_count(1),
        metavar="N",
        help="cards that share the model, which must divide its heads: 1, 2 or 4 of the published one (1)",
    )
    engine.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        help="dummy: weights drawn at random, for who measures; --model needs config.json and a tokenizer only (auto)",
    )
    engine.add_argument(
        "--quantization",
        choices=("wint4", "wint8"),
        help="weights, as they load; unset: as config.json asks, else as stored",
    )
    engine.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, help="reuse what prompts share (on)"
    )
    engine.add_argument(
        "--enable-chunked-prefill", action=argparse.BooleanOptionalAction, help="split long prompts over steps (on)"
    )
    engine.add_argument(
        "--batch-invariant",
        action="store_true",
        help="on a GPU, give a request the same text whatever is computed beside it, at a cost "
        "(docs/guarantees.md); CPUs always do",
    )
    engine.add_argument(
        "--speculative-config",
        type=_json(dict[str, Any]),
        metavar="JSON",
        help='{"method": "ngram", "num_speculative_tokens": 8}: guess tokens and verify several in a step, which '
        "changes no answer (docs/speculation.md); 0 tokens, or unset: none",
    )
    engine.add_argument("--block-size", type=_count(1), metavar="TOKENS", help="of one block of the KV cache")
    engine.add_argument("--num-gpu-blocks-override", type=_count(1), metavar="N", help="blocks of the KV cache")
    engine.add_argument(
        "--torch-threads",
        type=_count(1),
        metavar="N",
        help="CPU threads of the engine, and as many of the mm_encoder (unset: the cores shared out between them)",
    )
    for name in ("--reasoning-parser", "--tool-call-parser"):
        engine.add_argument(name, choices=(PARSER, ""), metavar="NAME", help=f'{PARSER} (the default), or "" for none')
    engine.add_argument(
        "--tool-calls-in-reasoning",
        action=argparse.BooleanOptionalAction,
        help="a complete call at the end of reasoning, with no </think> after it, is a call (on)",
    )
    engine.add_argument(
        "--tool-call-ends-reasoning",
        action=argparse.BooleanOptionalAction,
        help="a call that begins in reasoning ends it, for requests that do not say (off)",
    )
    engine.add_argument(
        "--force-nonempty-content",
        action=argparse.BooleanOptionalAction,
        help="an answer that is all reasoning is sent as content too, for requests that do not say (off)",
    )
    engine.add_argument(
        "--trust-request-chat-template",
        action=argparse.BooleanOptionalAction,
        help="requests may bring a chat template (off)",
    )
    engine.add_argument("--enable-logprob", action=_Accept, nargs=0, help="requests may ask for logprobs (always on)")
    return parser


def _dashed(argument: str) -> str:
    """Return a flag that is written with underscores as it is listed; anything else as it is."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and name not in NOT_YET else argument


class _Accept(argparse.Action):
    """Flag that sets nothing, since what it asks for is always so."""

    def __call__(self, *_: object) -> None:
        return


def _why_unknown(argument: str) -> str:
    name = argument.partition("=")[0]
    if name in NOT_YET:
        return f"{name}: a flag of FastDeploy that Millrace does not support yet"
    return f"{argument}: no such flag; --help lists them all"


def _sampling_class(name: str) -> str:
    if name not in SAMPLING_CLASSES:
        raise ConfigError(f"FD_SAMPLING_CLASS: {name!r} is not supported; {' and '.join(SAMPLING_CLASSES)} are")
    return name


# --------------------------------------------------------------------------------------------------- argument types


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.exists() and _HUB_NAME.fullmatch(text):
        name = text.partition("/")[2]
        raise argparse.ArgumentTypeError(
            f"{text} is no directory here. If it is a model on a hub, fetch it first, "
            f"`hf download {text} --local-dir {name}`, and say --model {name}"
        )
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory (models are read from disk, never downloaded)")
    return path


def _file(text: str) -> str:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return str(path.absolute())


def _count(low: int, high: int | None = None) -> Callable[[str], int]:
    def count(text: str) -> int:
        bounds = f"from {low} to {high}" if high else f"of at least {low}"
        if not text.isascii() or not text.isdigit() or int(text) < low or (high and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return int(text)

    return count


_port = _count(1, 65535)


def _seconds(zero: bool) -> Callable[[str], float]:
    def seconds(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not (0.0 < number < math.inf or (zero and number == 0.0)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds{'' if zero else ' above 0'}")
        return number

    return seconds


def _share(text: str) -> float:
    share = _ratio(text)
    if share == 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return share


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return ratio


def _json(shape: Any) -> Callable[[str], Any]:
    def decode(text: str) -> Any:
        try:
            return msgspec.json.decode(text, type=shape)
        except msgspec.MsgspecError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return decode


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
