"""FastAPI application: the routes, and the responses to their errors."""

import errno
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.telemetry import TelemetryConfig
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.dialects.dialect import Dialect
from services.gateway.errors import NO_FILES, QUEUE_DOWN, UNEXPECTED, error_response, http_failure, openai_body
from services.gateway.http.handler import RequestHandler
from services.gateway.http.resume import Resumption
from services.gateway.request.model_names import ModelNames
from shared.errors import Failure, RequestError

OWNED_BY = "Baidu"
# FastAPI's telemetry would wrap every chunk of a stream, and log values that failed validation. Ours is in edge.py.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


class ModelCard(msgspec.Struct, frozen=True):
    """An entry of GET /v1/models."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = OWNED_BY
    root: str = ""


class Models(msgspec.Struct, frozen=True):
    """The served model under all its names."""

    names: ModelNames
    created: int
    max_model_len: int

    def card(self, name: str) -> ModelCard:
        """Describe the model under a name.

        Raises:
            RequestError: 404, it is not a name of the model.
        """
        return ModelCard(id=self.names.resolve(name), created=self.created, max_model_len=self.max_model_len)

    def cards(self) -> list[ModelCard]:
        """Describe the model under each of its names."""
        return [self.card(name) for name in self.names.listed]


class DirectResponse(Response):
    """Response whose handler writes to the connection itself, with nothing between it and the client."""

    def __init__(self, write: Callable[[Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._write(receive, send)


def build_app(
    handler: RequestHandler,
    dialects: Collection[Dialect],
    resumption: Resumption,
    served: Models,
    ready: Callable[[], Awaitable[dict[str, Any]]],
) -> FastAPI:
    """Build the application; `ready` returns the report of the health routes."""
    app = FastAPI(title="Millrace", docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY)
    _add_errors(app, dialects)
    _add_health(app, ready)
    for dialect in dialects:
        _add_dialect(app, handler, dialect)

    @app.get("/v1/chat/completions/{name}/events")
    async def events(name: str, request: Request) -> Response:
        return DirectResponse(partial(resumption.stream, name, request))

    @app.get("/v1/chat/completions/{name}")
    async def answer(name: str, request: Request) -> Response:
        return DirectResponse(partial(resumption.fetch, name, request))

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": served.cards()})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        return _json(served.card(model))

    _describe(app, [dialect.schema for dialect in dialects])
    return app


def _add_dialect(app: FastAPI, handler: RequestHandler, dialect: Dialect) -> None:
    body = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{dialect.schema.__name__}"}}}}

    @app.post(dialect.path, openapi_extra={"requestBody": {**body, "required": True}})
    async def ask(request: Request) -> Response:
        return DirectResponse(partial(handler.handle, dialect, request))


def paths(app: FastAPI) -> list[str]:
    """Return the paths of the routes."""
    return list(app.openapi()["paths"])


def _add_health(app: FastAPI, ready: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    @app.get("/health/live")
    @app.get("/ping")
    @app.post("/ping")
    async def alive() -> Response:
        return _json({"status": "alive"})

    @app.get("/health")
    @app.get("/health/ready")
    async def is_ready() -> Response:
        report = await ready()
        return _json(report, 503 if report["missing"] else 200)


def _add_errors(app: FastAPI, dialects: Iterable[Dialect]) -> None:
    bodies = {dialect.path: dialect.failure for dialect in dialects}

    def response(request: Request, failure: Failure, headers: Mapping[str, str] | None = None) -> Response:
        return error_response(failure, headers, bodies.get(request.url.path, openai_body))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return response(request, error.failure)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
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


def _describe(app: FastAPI, schemas: Collection[type]) -> None:
    """Add the schemas of bodies, which are msgspec types, to FastAPI's description of the routes."""
    described = app.openapi()
    _, components = msgspec.json.schema_components(schemas, ref_template="#/components/schemas/{name}")
    described.setdefault("components", {}).setdefault("schemas", {}).update(components)
    app.openapi_schema = described


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
