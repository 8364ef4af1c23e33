"""The garbage collector of a service that is ready."""

import gc

# Once a service is ready: the second look has what survived the first, and the third all.
# Python's own 700 is reached by live requests that come and go: with 256 clients it looked every two seconds, for 4 ms,
# at what they hold, and found nothing. All is looked at once there are 90,000 objects more (Python: 100,000), or later
# in a large process, since CPython also waits until what survived the second look is a quarter of what the last look at
# all has left: 150,001 after one at 300,000 objects. No request leaves a cycle behind that would hold a body or media
# until then.
THRESHOLDS = (30_000, 0, 0)


def keep_from_collector() -> None:
    """Let the garbage collector never look at what is there already, which stays: a look takes an engine 0.2 s.

    At what comes then it looks after as many new objects as only a leak of cycles or a large burst of requests brings.
    May be called again, and then looks at what came since.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
