"""Drawing of the pipeline's state as tables that rich can print."""

import time

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shared.bus.pipeline_view import HELD, QUEUES, ROOM, PipelineView, QueueView, ReplicaView, StageView, problems
from shared.visible import visible

COLOURS = {"ready": "green", "starting": "yellow", "draining": "yellow", "gone": "red", "unreadable": "red"}
SHARES = ("kv_usage", "prefix_hits", "guesses_right", "cache_hits")  # figures that are parts of one
RATES = {"gateway": "answered_per_s", "mm_encoder": "media_per_s", "engine": "tokens_per_s", "postproc": "tokens_per_s"}
NOTHING = "-"


def draw(view: PipelineView) -> RenderableType:
    """Draw the whole board."""
    return Group(_head(view), _stages(view), _replicas(view), _streams(view), *_batches(view), _redis(view))


def duration(seconds: float | None) -> str:
    """Write a duration in two or three digits: 12 ms, 1.5 s, 59 s, 12 m, 3.4 h."""
    if seconds is None:
        return NOTHING
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    for limit, size, unit in ((60, 1, "s"), (3600, 60, "m"), (172_800, 3600, "h")):
        if seconds < limit:
            return _short(seconds / size) + f" {unit}"
    return _short(seconds / 86400) + " d"


def size(number: float) -> str:
    """Write a number of bytes: 812 B, 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{_short(number)} {unit}"
        number /= 1000
    return f"{_short(number)} TB"


def figure(name: str, value: float) -> str:
    """Write one figure of a lease, in the unit that its name ends in."""
    if name in SHARES:
        return f"{value:.0%}"
    if name.endswith("_per_s"):
        return f"{_short(value)}/s"
    return duration(value) if name.endswith("_s") else f"{value:.0f}"


def _text(words: str, style: str = "") -> Text:
    """Return words of Redis's, in which brackets are no markup."""
    return Text(visible(words), style)


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 9.95 else f"{number:.0f}"


def _head(view: PipelineView) -> RenderableType:
    found = problems(view)
    at = time.strftime("%H:%M:%S", time.localtime(view.at))
    verdict = Text(f"{len(found)} to look at", "bold red") if found else Text("all is well", "green")
    title = Text.assemble(("millrace", "bold"), f"  {view.namespace}  {at}  ", verdict)
    return Group(title, *(_text(f"  {problem}", "red") for problem in found), Text())


def _table(*columns: str, gap: int = 2) -> Table:
    """Make a table. The first column is a name, the others are figures unless they begin with "<"."""
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold dim")
    for place, column in enumerate(columns):
        left = place == 0 or column.startswith("<")
        table.add_column(column.removeprefix("<"), justify="left" if left else "right", no_wrap=column != "<figures")
    return table


def _stages(view: PipelineView) -> RenderableType:
    table = _table(
        *("stage", "ready", "coming", "leaving", "in work", "waiting", "waits", "oldest", "quarantine", "rate"),
        gap=1,  # in 80 columns
    )
    for stage in view.stages:
        ready, coming = len(stage.ready), len(stage.within("starting"))
        asleep = not ready and not (stage.queue is None or stage.queue.length)
        colour = "green" if ready else "dim" if asleep else "red"
        table.add_row(
            stage.service,
            Text(str(ready), colour),
            str(coming or NOTHING),
            str(len(stage.within("draining", "gone")) or NOTHING),
            _total(stage, HELD[stage.service], ""),
            *_queue(stage.queue),
            _total(stage, RATES[stage.service], "/s"),
        )
    return Group(table, Text())


def _queue(queue: QueueView | None) -> tuple[RenderableType, ...]:
    if queue is None:
        return (NOTHING,) * 4
    quarantined = Text(str(queue.quarantined), "bold red") if queue.quarantined else NOTHING
    return (str(queue.waiting), duration(queue.waiting_s), duration(queue.oldest_s), quarantined)


def _total(stage: StageView, name: str, unit: str) -> str:
    values = [replica.load[name] for replica in stage.replicas if name in replica.load]
    return (_short(sum(values)) if unit else f"{sum(values):.0f}") + unit if values else NOTHING


def _replicas(view: PipelineView) -> RenderableType:
    table = _table("replica", "<state", "up", "<version", "in work", "<figures")
    for stage in view.stages:
        pending = {each.name: each.pending for each in stage.queue.consumers} if stage.queue else {}
        names = {replica.name for replica in stage.replicas}
        for replica in stage.replicas:
            table.add_row(*_replica(stage.service, replica))
        # Replicas whose lease has left the index, and whose work no other has taken over yet.
        for name, number in pending.items():
            if number and name not in names:
                table.add_row(_text(name), Text("dead", "red"), NOTHING, NOTHING, str(number), "to be taken over")
    return Group(table, Text())


def _replica(service: str, replica: ReplicaView) -> tuple[RenderableType, ...]:
    shown = {HELD[service], ROOM.get(service)}
    held = replica.load.get(HELD[service])
    room = replica.load.get(ROOM.get(service, ""))
    rest = [
        f"{_short_name(name)}={figure(name, value).replace(' ', '')}"  # in one word, so that no line ends in it
        for name, value in replica.load.items()
        if name not in shown and (value or not name.endswith("_per_s"))
    ]
    return (
        _text(replica.name),
        _text(replica.state, COLOURS.get(replica.state, "")),
        duration(replica.up_s),
        _text(replica.version or NOTHING),
        NOTHING if held is None else f"{held:.0f}" + ("" if room is None else f"/{room:.0f}"),
        _text("  ".join(rest), "dim"),
    )


def _short_name(name: str) -> str:
    return name.removesuffix("_per_s").removesuffix("_s")


def _streams(view: PipelineView) -> RenderableType:
    table = _table("stream", "entries", "oldest", "<read by")
    for service, stream in QUEUES.items():
        queue = view.stage(service).queue
        assert queue is not None
        readers = ", ".join(f"{each.name} ({each.pending})" for each in queue.consumers)
        table.add_row(stream, str(queue.length), duration(queue.oldest_s), _text(readers or NOTHING))
    for shard in view.shards:
        owner = _text(f"{shard.owner}, epoch {shard.epoch}") if shard.owner else Text("nobody", "red")
        table.add_row(f"tokens:{shard.shard}", str(shard.length), duration(shard.oldest_s), owner)
    table.add_row("control", str(view.control_length), NOTHING, "every replica")
    return Group(table, Text())


def _batches(view: PipelineView) -> list[RenderableType]:
    """Draw the batches that have not ended; nothing where there are none."""
    batches = view.batches
    if not batches.count:
        return []
    table = _table("batches", "in work", "waiting", "lines", "done", "oldest")
    figures = (batches.working, batches.waiting, batches.lines, batches.done)
    table.add_row(str(batches.count), *map(str, figures), duration(batches.oldest_s))
    return [table, Text()]


def _redis(view: PipelineView) -> RenderableType:
    blobs = f"{view.blobs.count} blobs, {size(view.blobs.bytes)}"
    redis = view.redis
    if redis is None:
        return Text(f"redis: this user may not ask it for figures; {blobs}", "dim")
    memory = size(redis.used_bytes) + (f" of {size(redis.max_bytes)}" if redis.max_bytes else "")
    parts = [
        f"{redis.version}, up {duration(redis.up_s)}",
        memory,
        blobs,
        f"{redis.ops_per_s} commands/s",
        f"{redis.clients} clients ({redis.blocked} waiting)",
        "append-only file" if redis.kept_on_disk else "nothing on disk",
    ]
    return Text("  ".join(parts), "dim")
