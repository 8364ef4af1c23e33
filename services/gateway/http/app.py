"""FastAPI application: the routes, and the responses to their errors."""

import contextlib
import errno
import warnings
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.telemetry import TelemetryConfig
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from services.gateway.dialects.dialect import Dialect
from services.gateway.errors import NO_FILES, QUEUE_DOWN, UNEXPECTED, FailureBodies, error_response, http_failure
from services.gateway.http.counting import TokenCounter
from services.gateway.http.handler import RequestHandler
from services.gateway.http.resume import KEPT, Kept, Resumption
from services.gateway.http.tokens import TokenRoutes, add_token_routes
from services.gateway.request.model_names import ModelNames
from shared.errors import Failure, RequestError
from shared.version import MILLRACE_VERSION

OWNED_BY = "Baidu"
FEATURES = (
    *("chat", "completions", "streaming", "images", "videos", "reasoning", "tools", "structured_outputs"),
    *("logprobs", "prompt_logprobs", "token_ids", "idempotency", "resumption"),
)
READ = ["GET", "HEAD"]
# FastAPI's telemetry would wrap every chunk of a stream, and log values that failed validation. Ours is in edge.py.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}

OPENAI_ONLY = FailureBodies()
_Handler = Callable[[Request, Receive, Send], Awaitable[None]]


class RequestLimits(msgspec.Struct, frozen=True):
    """Limits that clients may want to know, of one request."""

    images: int
    videos: int
    choices: int
    body_bytes: int
    text_bytes: int  # of a body, beside its uploads
    media_bytes: int  # of one upload
    timeout_s: float


class ModelCard(msgspec.Struct, frozen=True):
    """An entry of GET /v1/models."""

    id: str
    created: int
    max_model_len: int
    limits: RequestLimits
    features: tuple[str, ...]
    object: str = "model"
    owned_by: str = OWNED_BY
    root: str = ""


class Models(msgspec.Struct, frozen=True):
    """The served model under all its names."""

    names: ModelNames
    created: int
    max_model_len: int
    limits: RequestLimits

    def card(self, name: str) -> ModelCard:
        """Describe the model under a name.

        Raises:
            RequestError: 404, it is not a name of the model.
        """
        return ModelCard(self.names.resolve(name), self.created, self.max_model_len, self.limits, FEATURES)

    def cards(self) -> list[ModelCard]:
        """Describe the model under each of its names."""
        return [self.card(name) for name in self.names.listed]


class DirectResponse(Response):
    """Response whose handler writes to the connection itself, with nothing between it and the client."""

    def __init__(self, write: Callable[[Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):  # there is nobody to tell
            await self._write(receive, send)


def build_app(
    handler: RequestHandler,
    dialects: Collection[Dialect],
    resumption: Resumption,
    served: Models,
    tokens: TokenRoutes,
    ready: Callable[[], Awaitable[dict[str, Any]]],
    count_refusal: Callable[[str, str, Failure], None],
    *,
    bodies: FailureBodies = OPENAI_ONLY,
    counters: Collection[TokenCounter] = (),
) -> FastAPI:
    """Build the application. `ready` returns the report of the health routes; `count_refusal` is told the method, the
    path and the failure of a request that was not accepted."""
    app = FastAPI(title="Millrace", docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY, redirect_slashes=False)
    _add_errors(app, bodies, count_refusal)
    _add_health(app, ready)
    for dialect in dialects:
        _add_post(app, dialect.path, dialect.schema, partial(handler.handle, dialect))
    for counter in counters:
        _add_post(app, counter.path, counter.schema, counter.count)

    for kept in KEPT:
        _add_kept(app, resumption, kept)

    add_token_routes(app, tokens)

    @app.api_route("/version", methods=READ)
    async def version() -> Response:
        return _json({"version": MILLRACE_VERSION})

    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        return _json({"object": "list", "data": served.cards()})

    @app.api_route("/v1/models/{model:path}", methods=READ)
    async def model(model: str) -> Response:
        return _json(served.card(model))

    _describe(app, [*(dialect.schema for dialect in dialects), *(counter.schema for counter in counters)])
    return app


def _add_post(
    app: FastAPI, path: str, schema: type, handle: Callable[[Request, Receive, Send], Awaitable[None]]
) -> None:
    body = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}}

    @app.post(path, openapi_extra={"requestBody": {**body, "required": True}})
    async def ask(request: Request) -> Response:
        return DirectResponse(partial(handle, request))


def _add_kept(app: FastAPI, resumption: Resumption, kept: Kept) -> None:
    @app.get(kept.path + "/{name}/events")
    async def events(name: str, request: Request) -> Response:
        return DirectResponse(partial(resumption.stream, kept, name, request))

    @app.api_route(kept.path + "/{name}", methods=READ)
    async def answer(name: str, request: Request) -> Response:
        return DirectResponse(partial(resumption.fetch, kept, name, request))

    @app.post(kept.path + "/{name}/cancel")
    async def cancel(name: str, request: Request) -> Response:
        return _json(await resumption.cancel(kept, name, request))


def paths(app: FastAPI) -> list[str]:
    """Return the paths of the routes."""
    return list(app.openapi()["paths"])


def _add_health(app: FastAPI, ready: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    @app.api_route("/health/live", methods=READ)
    @app.api_route("/ping", methods=READ)
    @app.post("/ping")
    async def alive() -> Response:
        return _json({"status": "alive"})

    @app.api_route("/health", methods=READ)
    @app.api_route("/health/ready", methods=READ)
    async def is_ready() -> Response:
        report = await ready()
        return _json(report, 503 if report["missing"] else 200)


def _add_errors(app: FastAPI, bodies: FailureBodies, count_refusal: Callable[[str, str, Failure], None]) -> None:
    def response(request: Request, failure: Failure, headers: Mapping[str, str] | None = None) -> Response:
        count_refusal(request.method, request.url.path, failure)
        return error_response(failure, headers, bodies.of(request.url.path))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return response(request, error.failure)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allow = {"allow": ", ".join(sorted(allowed_methods(app, request.scope)))}
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=allow)
            failure = http_failure(405, error.detail, request.method, request.url.path)
            return response(request, failure, allow)
        failure = http_failure(error.status_code, error.detail, request.method, request.url.path)
        return response(request, failure, error.headers)

    @app.exception_handler(RedisError)
    async def unreachable(request: Request, _error: RedisError) -> Response:
        return response(request, QUEUE_DOWN)

    @app.exception_handler(OSError)
    async def exhausted(request: Request, error: OSError) -> Response:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise error
        return response(request, NO_FILES)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, _error: Exception) -> Response:
        return response(request, UNEXPECTED)


def allowed_methods(app: FastAPI, scope: Scope) -> set[str]:
    """Return the methods of a path."""
    routes = [route for route in app.router.routes if route.matches(scope)[0] is not Match.NONE]
    return {"OPTIONS"}.union(*(route.methods for route in routes if isinstance(route, Route) and route.methods))


def _describe(app: FastAPI, schemas: Collection[type]) -> None:
    """Add the schemas of bodies, which are msgspec types, to FastAPI's description of the routes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the operations of a route with two methods have one id
        described = app.openapi()
    for operations in described["paths"].values():
        for method, operation in operations.items():
            operation["operationId"] = f"{operation['operationId'].rpartition('_')[0]}_{method}"
    _, components = msgspec.json.schema_components(schemas, ref_template="#/components/schemas/{name}")
    described.setdefault("components", {}).setdefault("schemas", {}).update(components)
    app.openapi_schema = described


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
