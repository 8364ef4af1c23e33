"""Refusal of media: a 400 that says what is wrong, the limit that was passed, and the request's field."""

import msgspec

from shared.errors import RequestError, invalid


def refuse(what: str) -> RequestError:
    """The media itself cannot be used, whatever the limits."""
    return invalid(what, None, "invalid_media")


def over_limit(what: str, limit: str, value: float) -> RequestError:
    """The media passes a limit of this deployment; `limit` is the setting's name."""
    return invalid(f"{what} exceeds the limit {limit} = {value:g}.", None, "media_limit_exceeded")


def named(error: RequestError, param: str) -> RequestError:
    """The same about one field of one request; whoever looks only at the media does not know it."""
    failure = error.failure
    if failure.param is not None:
        return error
    return RequestError(msgspec.structs.replace(failure, param=param, message=f"`{param}`: {failure.message}"))
