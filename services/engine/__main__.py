"""The engine's composition root: `python -m services.engine`, configured by MILLRACE_* variables."""

from shared.termination import end_when_terminated

if __name__ == "__main__":
    end_when_terminated()  # before the other imports, which take seconds

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from redis.asyncio import Redis

from services.engine.device_defaults import decide, decided
from services.engine.kernels.first_use import report_first_uses
from services.engine.kernels.ops import Ops
from services.engine.kernels.reference.parallel import parallel_ops
from services.engine.loop.engine import Engine
from services.engine.loop.mailbox import Mailbox
from services.engine.metrics import EngineMetrics
from services.engine.model.ernie import ErnieModel
from services.engine.model.integers import rounded_scales
from services.engine.model.split import WHOLE, Split
from services.engine.model.weights import load_model
from services.engine.ranks.exchange import Exchange, make_safe
from services.engine.ranks.lead import LeadRunner
from services.engine.ranks.processes import Ranks
from services.engine.run.assembly import runner_for
from services.engine.run.rows import rows_depend_on_others
from services.engine.run.runner import Runner
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.prefill_budget import PrefillBudget
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.sequence import EngineFacts
from services.engine.schedule.speculation import Speculation
from services.engine.schedule.step_times import LearnedTimes
from services.engine.service import EngineService
from services.engine.settings import EngineSettings, SpeculativeConfig
from services.engine.transport.grammars import Compile, Grammars
from services.engine.transport.handler import SERVICE, GenerateHandler, waiting_allowance
from services.engine.transport.outbox import Outbox
from shared.bus.blobs import Blobs
from shared.bus.client import connect_blobs
from shared.bus.keys import GENERATE, Keys
from shared.bus.records import Records
from shared.bus.work_stream import WorkStream
from shared.card_page import CardPage, OwnPage
from shared.cpu_share import compute_threads, torch_threads
from shared.errors import CheckpointError, ConfigError
from shared.grammar.compiler import GrammarCompiler
from shared.launch import launch
from shared.log import logger, warn_each
from shared.model.checkpoint import Checkpoint
from shared.model.config import ModelConfig, chosen_quantization, load_model_config
from shared.model.division import divided
from shared.model.drawn_weights import DrawnWeights
from shared.model.foreign_checkpoints import refuse_foreign
from shared.model.tensor_source import TensorSource
from shared.model.tokenizer import Tokenizer
from shared.model.vocabulary import check_vocabulary
from shared.reproducible import fix_order_of_sums
from shared.segments import Reader, Segments
from shared.tracing import OFF, Tracing
from shared.watchdog import FirstUse, Watchdog, end_process, unwatched

THINK_CLOSE = "</think>"
TOOL_CALL = "<tool_call>"
CLAIMS_PER_LEASE = 10  # claims of abandoned entries in the time of a lease
# On a GPU every kernel was compiled before the first step that is watched, but for one that the rehearsal forgot; a CPU
# may be far too slow for the model, and is not hung then.
FIRST_USE = {"cuda": FirstUse(10.0, 0.0, compiles=True), "cpu": FirstUse(0.0, 0.1, compiles=False)}

Load = Callable[[], tuple[Runner, int]]


def build(settings: EngineSettings, redis: Redis, *, tracing: Tracing = OFF) -> EngineService[tuple[Runner, int]]:
    """Build the service from its settings and the model directory; the weights are loaded when it starts.

    Raises:
        ConfigError: a setting is out of range, contradicts the model, or asks for a device that is not there.
        CheckpointError: the model directory is incomplete or malformed.
    """
    directory = Path(settings.model)
    refuse_foreign(directory)
    model = load_model_config(directory)
    warn_each(logger(__name__), model.warnings)
    warn_each(logger(__name__), contradictions(settings, model))
    if settings.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {settings.max_model_len}; the model's positions end at {model.max_position_embeddings}"
        )
    divided(model, settings.tensor_parallel_size)
    chosen_quantization(model, settings.quantization)
    tokenizer = Tokenizer.load(directory)
    warn_each(logger(__name__), check_vocabulary(directory, model, tokenizer))
    think_close_id = tokenizer.token_id(THINK_CLOSE)
    if think_close_id is None:
        raise CheckpointError(f"the tokenizer of {directory} has no {THINK_CLOSE}")
    where = device(settings)
    asked, settings = settings, decide(settings, card_bytes(where))
    for text in decided(asked, settings):
        logger(__name__).info(text)
    facts = EngineFacts(model, settings.max_model_len, think_close_id, tokenizer.control.get(TOOL_CALL))
    ranks = Ranks(settings, os.environ) if settings.tensor_parallel_size > 1 else None
    metrics, watchdog = EngineMetrics(), None
    if settings.step_timeout_s > 0:
        expire = end_process if ranks is None else lambda step, age: end_process(step, age, ranks=ranks.behind())
        watchdog = Watchdog(settings.step_timeout_s, FIRST_USE[where], metrics.step_age.set, expire)
    compiler = GrammarCompiler(tokenizer, model.vocab_size, model.eos_ids)
    start = partial(load, settings, model, where, ranks)
    return compose(settings, redis, facts, compiler.compile, start, metrics, tracing, watchdog, ranks)


def compose(
    settings: EngineSettings,
    redis: Redis,
    facts: EngineFacts,
    compile_grammar: Compile,
    load: Load,
    metrics: EngineMetrics,
    tracing: Tracing = OFF,
    watchdog: Watchdog | None = None,
    ranks: AbstractContextManager[object] | None = None,
) -> EngineService[tuple[Runner, int]]:
    """Build the service around a `load` that returns the runner and its number of cache blocks, a `compile_grammar` for
    its vocabulary, and the other ranks, of which it is the first."""
    keys = Keys(settings.namespace)
    blob_redis = connect_blobs(settings, redis)
    mailbox = Mailbox()
    segments = Segments(Path(settings.segments_dir)) if settings.segments_dir else None
    handler = GenerateHandler(
        redis=redis,
        keys=keys,
        stream=WorkStream(redis, keys, GENERATE, SERVICE, settings.name, settings.max_deliveries),
        records=Records(redis, keys),
        blobs=Blobs(blob_redis, keys, settings.blob_ttl_s, settings.blob_budget_bytes),
        mailbox=mailbox,
        facts=facts,
        grammars=Grammars(compile_grammar),
        metrics=metrics,
        capacity=settings.max_num_seqs + waiting_allowance(settings.max_num_seqs),
        max_num_seqs=settings.max_num_seqs,
        claim_every_s=settings.lease_ms / 1000 / CLAIMS_PER_LEASE,
        recheck_s=settings.lease_ms / 3000,
        partial_prompts=settings.enable_chunked_prefill,
        segments=segments,
        tracing=tracing,
    )
    reader = None if segments is None else Reader(segments, settings.name)
    watch, waiting = (unwatched, contextlib.nullcontext) if watchdog is None else (watchdog.watch, watchdog.waiting)
    outbox = Outbox(redis, keys, handler.finished, handler.begun, waiting)

    def run(loaded: tuple[Runner, int]) -> None:
        runner, num_blocks = loaded
        report_first_uses(partial(warn_of_first_use, metrics))
        own_page = card_page(settings, segments)
        page = None if own_page is None else own_page.page
        pool = BlockPool(num_blocks, settings.enable_prefix_caching)
        limits = Limits(
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            settings.enable_chunked_prefill,
            settings.block_size,
            prefill_budget(settings, runner, page),
            speculation(settings.speculative_config, runner),
        )
        with ranks or contextlib.nullcontext(), own_page or contextlib.nullcontext():
            Engine(mailbox, Scheduler(pool, limits), pool, runner, outbox.put, metrics, watch, page).run()

    return EngineService(
        handler=handler,
        mailbox=mailbox,
        outbox=outbox,
        load=load,
        run=run,
        metrics=metrics,
        capacity=settings.max_num_seqs,
        watchdog=watchdog,
        own_clients=() if blob_redis is redis else (blob_redis,),
        reader=reader,
    )


def card_page(settings: EngineSettings, segments: Segments | None) -> OwnPage | None:
    """Return our page for encoders on the same GPU, where this host's encoders share memory with us."""
    if segments is None or device(settings) != "cuda":
        return None
    try:
        return OwnPage(segments, settings.name, str(torch.cuda.get_device_properties("cuda").uuid))
    except (OSError, ValueError) as error:  # somebody has removed the directory or cut the file, or memory is full
        logger(__name__).warning("encoders on this GPU cannot see when tokens wait", extra={"error": str(error)})
        return None


def prefill_budget(settings: EngineSettings, runner: Runner, page: CardPage | None = None) -> PrefillBudget | None:
    """Return how prompts share a step, and the bound on that beside sequences that decode; None: by arrival."""
    if not settings.max_token_gap_ms or not settings.enable_chunked_prefill:
        return None
    budget = PrefillBudget(settings.max_token_gap_ms, runner.step_times or LearnedTimes())
    return budget if page is None else replace(budget, encoder_works=page.encoder_works)


def warn_of_first_use(metrics: EngineMetrics, what: str) -> None:
    """Count and log a kernel or plan that the rehearsal has missed."""
    metrics.first_uses.inc()
    logger(__name__).warning("a request waited for the first use of a kernel or plan", extra={"what": what})


def load(settings: EngineSettings, config: ModelConfig, where: str, ranks: Ranks | None = None) -> tuple[Runner, int]:
    """Return a runner around the model, its cache and its sampler, and the number of cache blocks.

    Args:
        ranks: the others, of which this process is the first; started here.

    Raises:
        ConfigError: the cache could not hold max_model_len, or batch_invariant is asked of a CPU that cannot.
        CheckpointError: the weights do not match the configuration.
    """
    if ranks is None:
        return runner_for(load_part(settings, config, where), config, settings)
    make_safe(os.environ)
    with contextlib.ExitStack() as unless_loaded:
        unless_loaded.push(ranks)
        exchange = ranks.start(where, config)
        model = load_part(settings, config, where, Split(0, settings.tensor_parallel_size), exchange)
        runner, blocks = runner_for(model, model.config, settings, exchange.least, ranks.orders)
        unless_loaded.pop_all()
    return LeadRunner(runner, ranks.orders), blocks


def load_part(
    settings: EngineSettings, config: ModelConfig, where: str, split: Split = WHOLE, exchange: Exchange | None = None
) -> ErnieModel:
    """Load a rank's part of the model.

    Args:
        exchange: with the other ranks; None if there are none.

    Raises:
        ConfigError, CheckpointError: as `load`.
    """
    torch.set_num_threads(compute_threads(torch_threads(settings.torch_threads, torch.get_num_threads()), split.size))
    fix_order_of_sums(os.environ)
    ops = operations(where, settings.batch_invariant, exchange)
    weights = weights_of(settings, where)
    if isinstance(weights, Checkpoint):
        warn_each(logger(__name__), rounded_scales(weights, config))
    model = load_model(weights, config, where, chosen_quantization(config, settings.quantization), ops, split)
    if where == "cpu" and split.rank == 0 and rows_depend_on_others(model.dtype):
        told = "this CPU rounds a row's sums by what is computed beside it"
        if settings.batch_invariant:
            raise ConfigError(f"batch_invariant is true, but {told}; see docs/guarantees.md")
        logger(__name__).warning(
            "%s, so that a seeded request may get another text in other company; see docs/guarantees.md", told
        )
    return model


def weights_of(settings: EngineSettings, where: str) -> TensorSource:
    """Open the checkpoint, or draw weights in its place.

    Raises:
        CheckpointError: there are no weights, or not as they should be.
    """
    if settings.load_format == "dummy":
        logger(__name__).warning("weights are drawn at random (load_format is dummy): answers mean nothing")
        return DrawnWeights(torch.device(where))
    checkpoint = Checkpoint(Path(settings.model))
    warn_each(logger(__name__), checkpoint.warnings)
    return checkpoint


def contradictions(settings: EngineSettings, config: ModelConfig) -> Iterator[str]:
    """Describe what config.json asks for and a setting overrules."""
    asked, chosen = config.quantization, settings.quantization
    if asked is not None and chosen not in (None, asked):
        yield f"config.json asks for quantization {asked} and the setting for {chosen}; the setting wins"


def speculation(config: SpeculativeConfig | None, runner: Runner) -> Speculation | None:
    """Return the scheduler's limits of guessing."""
    if config is None or not config.num_speculative_tokens:
        return None
    logger(__name__).info("tokens are guessed and verified", extra=msgspec.structs.asdict(config))
    times = None if runner.step_times is None else runner.step_times.decode
    return Speculation(config.num_speculative_tokens, config.prompt_lookup_min, config.disable_by_batch_size, times)


def operations(where: str, batch_invariant: bool = False, exchange: Exchange | None = None) -> Ops:
    """Return the model's operations for a device; with `exchange`, those of one rank of several."""
    if where != "cuda":
        return Ops() if exchange is None else parallel_ops(exchange.gather)
    # Triton exists for Linux only, and the CPU needs none.
    from services.engine.kernels.triton import parallel
    from services.engine.kernels.triton.invariant.ops import invariant_ops
    from services.engine.kernels.triton.ops import gpu_ops

    ops, products = (invariant_ops(), parallel.INVARIANT) if batch_invariant else (gpu_ops(), parallel.FASTEST)
    if exchange is None:
        return ops
    # A kernel for few rows alone may round otherwise than that for many.
    peer_memory = None if batch_invariant else exchange.peer_memory
    return parallel.parallel_ops(ops, exchange.gather, products, peer_memory)


def device(settings: EngineSettings) -> str:
    """Return the torch device of the settings: "cuda" or "cpu".

    Raises:
        ConfigError: cuda was asked for and is not there, or not as many devices as there are ranks.
    """
    available, size = torch.cuda.is_available(), settings.tensor_parallel_size
    if settings.device == "cuda" and not available:
        raise ConfigError("device is cuda, but torch sees no CUDA device; set it to auto or cpu")
    if settings.device == "cpu" or not available:
        return "cpu"
    if size > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size is {size}, and torch sees {torch.cuda.device_count()} CUDA devices here; each rank "
            "needs one"
        )
    return "cuda"


def card_bytes(where: str) -> int | None:
    """Return the memory of the first GPU, of which this process may use a part; None on a CPU."""
    if where == "cpu":
        return None
    return int(torch.cuda.get_device_properties(0).total_memory * torch.cuda.get_per_process_memory_fraction(0))


def main() -> int:
    """Run the service until it is stopped; return the exit status."""
    return launch(SERVICE, EngineSettings, build, os.environ)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the model's thread may still be loading or releasing the model, and an interpreter that is torn down
    # under a thread inside C++ aborts.
    os._exit(status)
