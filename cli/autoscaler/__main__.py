"""Entry point of the autoscaler: `python -m cli.autoscaler` or `millrace autoscale`."""

from shared.termination import end_when_terminated

if __name__ == "__main__":
    end_when_terminated()  # before the other imports, which take seconds

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from redis.exceptions import RedisError

from cli.autoscaler.cluster import connect
from cli.autoscaler.leader import ROLE, Leadership
from cli.autoscaler.metrics import AutoscalerMetrics
from cli.autoscaler.scaler import Scaler
from cli.autoscaler.settings import AutoscalerSettings, load
from cli.connection import Parser
from shared import log, metrics
from shared.bus.client import connect as connect_redis
from shared.bus.keys import Keys
from shared.errors import ConfigError


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Scale until SIGTERM or SIGINT, and return the exit status.

    Raises:
        ConfigError: a setting is wrong, or there is no cluster.
    """
    parser = Parser(prog="millrace autoscale", description=__doc__, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do not")
    given = parser.parse_args(words)
    settings = load(environ)
    log.setup(ROLE, settings.name, settings.log_level)
    metrics.serve(settings.metrics_port)
    asyncio.run(serve(settings, given.dry_run))
    return 0


async def serve(settings: AutoscalerSettings, dry_run: bool) -> None:
    """Scale until SIGTERM or SIGINT.

    Raises:
        ConfigError: there is no cluster, or the URL of Redis is malformed.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    redis, keys = connect_redis(settings.redis_url), Keys(settings.namespace)
    cluster = await connect(settings.kube_namespace)
    leadership = Leadership(redis, keys, settings.name, settings.leader_ms)
    scaler = Scaler(redis, keys, cluster, leadership, settings.stages, AutoscalerMetrics(), dry_run)
    log.logger(__name__).info(
        "started",
        extra={
            "stages": ", ".join(f"{name} {each.least} to {each.most}" for name, each in settings.stages.items()),
            "interval_s": settings.interval_s,
            "dry_run": dry_run,
        },
    )
    try:
        work = asyncio.create_task(scaler.run(settings.interval_s))
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        work.cancel()
        await asyncio.gather(work, return_exceptions=stopping.is_set())
    finally:
        await _leave(leadership)
        await cluster.close()
        await redis.aclose()


async def _leave(leadership: Leadership) -> None:
    try:
        await leadership.release()
    except RedisError as error:
        log.logger(__name__).warning("leadership not released; it expires by itself", extra={"reason": str(error)})


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except ConfigError as error:
        print(f"{ROLE}: {error}", file=sys.stderr)
        sys.exit(2)
