"""Cross-origin requests of browsers (CORS), for the web pages that the operator allows."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

SHOWN = ("Retry-After", "X-Millrace-Warning", "X-Request-ID", "X-Should-Retry")  # headers that such a page may read
REMEMBERED_S = 600  # for which a browser need not ask again


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Answer for these origins, before keys are looked at: a browser asks without one. None: change nothing."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("*",),
        allow_headers=("*",),
        expose_headers=SHOWN,
        max_age=REMEMBERED_S,
    )
