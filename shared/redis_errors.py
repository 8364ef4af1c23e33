"""Table of the errors of Redis and what each leads to, for all services.

    Redis says              when                                            what we do
    (nothing)               it is away, or too slow                         wait
    LOADING                 it reads its data after a start                 wait
    BUSY                    a script of somebody's runs for long            wait
    ERR Script killed       an operator has ended that script, and ours     wait
    MISCONF                 the disk of its append-only file is full        wait
    OOM                     its memory is full, and it may not evict        wait
    NOREPLICAS              too few replicas follow it                      wait
    NOSCRIPT                it was started again, or forgot our scripts     wait
    READONLY                it is a replica now: another is the primary     reconnect
    MASTERDOWN              the same, and it has lost the primary           reconnect
    UNBLOCKED               it became a replica while we waited             reconnect
    NOAUTH, WRONGPASS       our user or its password is not valid now       sign in
    WRONGTYPE               a key holds something else than we write        wait; but see below
    anything else           we have made a mistake                          end

wait       The stages try again with growing delays, for as long as it takes, and the gateway answers new requests with
           503 and Retry-After. Streams under way stand still, and go on.
reconnect  The same, over new connections: names are resolved and Sentinel is asked again.
sign in    The same, but the replica ends with a message after `auth_patience_s` without one connection that was let in:
           what started it may know the new password.
end        The replica ends, and its work goes to others.

A key with a wrong type that belongs to one request fails that request alone: scripts and readers look at the type of
such keys, and take a wrong one for damaged bytes. So WRONGTYPE is only ever said of keys that all share (a work stream,
the shards), which an operator must delete; until then everybody waits. Redis does not say which key it is:
shared/bus/key_types.py does, when a replica starts and in the commands that look at a deployment.
"""

import re
from collections.abc import Mapping
from enum import Enum

from redis.exceptions import ConnectionError, RedisError, TimeoutError


class Action(Enum):
    """What an error leads to."""

    WAIT = "wait"
    RECONNECT = "reconnect"
    SIGN_IN = "sign in"
    END = "end"


ACTIONS: Mapping[str, Action] = {
    "LOADING": Action.WAIT,
    "BUSY": Action.WAIT,
    "KILLED": Action.WAIT,
    "MISCONF": Action.WAIT,
    "OOM": Action.WAIT,
    "NOREPLICAS": Action.WAIT,
    "NOSCRIPT": Action.WAIT,
    "READONLY": Action.RECONNECT,
    "MASTERDOWN": Action.RECONNECT,
    "UNBLOCKED": Action.RECONNECT,
    "NOAUTH": Action.SIGN_IN,
    "WRONGPASS": Action.SIGN_IN,
    "WRONGTYPE": Action.WAIT,
}
_KILLED = "Script killed by user"
_CODE = re.compile(r"""(?:^|caused error: (?:\(['"])?)([A-Z]+) """)  # of an error, or of one within a pipeline


class SignInError(RedisError):
    """Redis has refused our user or password for longer than `auth_patience_s`."""


def code_of(error: RedisError) -> str:
    """Return the word with which Redis says what kind of error it is; "" if it is none of Redis's."""
    if _KILLED in str(error):
        return "KILLED"
    known = getattr(error, "status_code", None)  # of the kinds for which redis-py has a class
    if known is not None:
        return str(known)
    if found := _CODE.search(str(error)):
        return found[1]
    cause = error.__cause__ or error.__context__  # of a ConnectionError: what was said while connecting
    return code_of(cause) if isinstance(cause, RedisError) else ""


def action_for(error: RedisError) -> Action:
    """Return what an error leads to."""
    found = ACTIONS.get(code_of(error))
    if found is None and isinstance(error, ConnectionError | TimeoutError):
        return Action.WAIT
    return found or Action.END


def is_wrong_type(error: RedisError) -> bool:
    """Return True if a key holds something else than the command works on."""
    return code_of(error) == "WRONGTYPE"
