"""Routes that are read by GET and HEAD."""

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI

E = TypeVar("E", bound=Callable[..., Any])


def reads(app: FastAPI, path: str) -> Callable[[E], E]:
    """Return a decorator that routes GET and HEAD. Only GET is described: an operation has an id that no other has."""

    def add(endpoint: E) -> E:
        app.head(path, include_in_schema=False)(endpoint)
        return app.get(path)(endpoint)

    return add
