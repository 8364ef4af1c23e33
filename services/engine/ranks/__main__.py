"""Program of a rank of tensor parallelism beside rank 0, which starts it:
`python -m services.engine.ranks MEMORY LINK RANK SIZE PORT`.

It has descriptors of the memory and of the socket by which orders come, and the port at which the ranks meet. Its
settings come as the first order. It knows no Redis and no request.
"""

import mmap
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import msgspec

from services.engine.__main__ import device, load_part
from services.engine.model.split import Split
from services.engine.ranks.exchange import Exchange, rank_device
from services.engine.ranks.follower import Follower
from services.engine.ranks.orders import OrderReader
from services.engine.ranks.processes import RING_BYTES
from services.engine.ranks.pulse import PAGE, Pulse
from services.engine.ranks.ring import Reader
from services.engine.run.assembly import runner_for
from services.engine.settings import EngineSettings
from shared import log
from shared.errors import CheckpointError, ConfigError
from shared.model.config import load_model_config
from shared.service import FAILED, MISCONFIGURED

BEAT_S = 0.1

_log = log.logger(__name__)


def main(memory: int, link: int, rank: int, size: int, port: int) -> int:
    """Work until rank 0 ends; return the exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 drains first, and then tells us
    ring = mmap.mmap(memory, RING_BYTES, offset=PAGE)
    pulse = Pulse(mmap.mmap(memory, PAGE), rank)
    orders = OrderReader(Reader(ring, socket.socket(fileno=link)))
    threading.Thread(target=_beat, args=(pulse,), name="beat", daemon=True).start()
    content = orders.read().content
    if not isinstance(content, bytes):
        return FAILED
    settings = msgspec.json.decode(content, type=EngineSettings)
    log.setup("engine", f"{settings.name}/{rank}", settings.log_level)
    try:
        follower = _load(settings, Split(rank, size), port, orders, pulse)
    except (ConfigError, CheckpointError) as error:
        _log.error("cannot start", extra={"reason": str(error)})
        return MISCONFIGURED
    pulse.serve()
    follower.run()
    return 0


def _load(settings: EngineSettings, split: Split, port: int, orders: OrderReader, pulse: Pulse) -> Follower:
    where = device(settings)
    settings = msgspec.structs.replace(settings, foreign_bytes=0)  # an encoder is on the first card only
    here = rank_device(where, split.rank)
    exchange = Exchange(split.rank, split.size, port, here, pulse.exchange, invariant=settings.batch_invariant)
    config = load_model_config(Path(settings.model))
    exchange.check(os.environ, config)
    model = load_part(settings, config, where, split, exchange)
    runner, _ = runner_for(model, model.config, settings, exchange.least)
    return Follower(runner, model, orders, pulse)


def _beat(pulse: Pulse) -> None:
    pause = threading.Event()
    while not pause.wait(BEAT_S):
        pulse.beat()


if __name__ == "__main__":
    try:
        status = main(*map(int, sys.argv[1:]))
    except Exception:
        _log.exception("failed")
        status = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as the engine's own: threads of libraries may be in C++
