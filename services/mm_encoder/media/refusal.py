"""Errors for refused media: a 400 that names what is wrong, the limit that is exceeded, and the request's field."""

import msgspec

from shared.errors import RequestError, invalid


def refuse(what: str) -> RequestError:
    """Return the error of media that cannot be used, whatever the limits."""
    return invalid(what, None, "invalid_media")


def over_limit(what: str, limit: str, value: float) -> RequestError:
    """Return the error of media that exceed a limit of this deployment; `limit` is the setting's name."""
    return invalid(f"{what} exceeds the limit {limit} = {value:g}.", None, "media_limit_exceeded")


def named(error: RequestError, param: str) -> RequestError:
    """Return the error with the request's field, which the modules that read media do not know."""
    failure = error.failure
    if failure.param is not None:
        return error
    return RequestError(msgspec.structs.replace(failure, param=param, message=f"`{param}`: {failure.message}"))
