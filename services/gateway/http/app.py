"""FastAPI application: the routes, and the responses to their errors."""

import errno
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

from services.gateway.batches.files import INPUT
from services.gateway.dialects.dialect import Dialect
from services.gateway.errors import NO_FILES, QUEUE_DOWN, UNEXPECTED, FailureBodies, error_response, http_failure
from services.gateway.http.answer import json_response
from services.gateway.http.batches import BatchRequest, BatchRoutes
from services.gateway.http.context import context_of
from services.gateway.http.counting import TokenCounter
from services.gateway.http.description import body_of, describe
from services.gateway.http.files import FileRoutes
from services.gateway.http.handler import RequestHandler, Session
from services.gateway.http.reads import reads
from services.gateway.http.responses import StoredResponses, is_stream
from services.gateway.http.resume import KEPT, Kept, Resumption
from services.gateway.http.tokens import TokenRoutes, add_token_routes
from services.gateway.request.model_names import ModelNames
from services.gateway.tenants.key_file import Tenant
from shared.errors import Failure, RequestError, release_frames
from shared.version import MILLRACE_VERSION

OWNED_BY = "Baidu"
FILES, BATCHES = "/v1/files", "/v1/batches"
FEATURES = (
    *("chat", "completions", "messages", "responses", "files", "batches"),
    *("streaming", "images", "videos", "reasoning", "tools", "structured_outputs"),
    *("logprobs", "prompt_logprobs", "token_ids", "idempotency", "resumption"),
)
# FastAPI's telemetry would wrap every chunk of a stream, and log values that failed validation. Ours is in edge.py.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}

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

    def card(self, name: str, tenant: Tenant | None) -> ModelCard:
        """Describe the model under a name.

        Raises:
            RequestError: 404, it is not a name of the model; 403, the tenant may not use it.
        """
        if tenant is not None:
            tenant.check_model(self.names.resolve(name))
        return ModelCard(self.names.resolve(name), self.created, self.max_model_len, self.limits, FEATURES)

    def cards(self, tenant: Tenant | None) -> list[ModelCard]:
        """Describe the model under each of its names that the tenant may use."""
        return [self.card(name, tenant) for name in self.names.listed if tenant is None or tenant.may_use(name)]


class DirectResponse(Response):
    """Response whose handler writes to the connection itself, with nothing between it and the client."""

    def __init__(self, write: Callable[[Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._write(receive, send)


class AppParts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the routes lead to."""

    handler: RequestHandler
    dialects: Collection[Dialect]
    resumption: Resumption
    responses: StoredResponses
    files: FileRoutes
    batches: BatchRoutes
    served: Models
    tokens: TokenRoutes
    counters: Collection[TokenCounter] = ()
    ready: Callable[[], Awaitable[dict[str, Any]]]  # returns the report of the health routes
    # Told the method, the path and the failure of a request that was not accepted.
    count_refusal: Callable[[str, str, Failure], None]
    bodies: FailureBodies = FailureBodies()


def build_app(parts: AppParts) -> FastAPI:
    """Build the application."""
    app = FastAPI(title="Millrace", docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY, redirect_slashes=False)
    _add_errors(app, parts.bodies, parts.count_refusal)
    _add_health(app, parts.ready)
    sessions: dict[str, Callable[[], Session]] = {parts.responses.dialect.name: parts.responses.session}
    for dialect in parts.dialects:
        session = sessions.get(dialect.name)
        _add_post(app, dialect.path, dialect.schema, partial(_handle, parts.handler, dialect, session))
    for counter in parts.counters:
        _add_post(app, counter.path, counter.schema, counter.count)
    _add_responses(app, parts.responses)
    _add_files(app, parts.files)
    _add_batches(app, parts.batches)
    for kept in KEPT:
        _add_kept(app, parts.resumption, kept)
    add_token_routes(app, parts.tokens)

    @reads(app, "/version")
    async def version() -> Response:
        return json_response({"version": MILLRACE_VERSION})

    @reads(app, "/v1/models")
    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": parts.served.cards(context_of(request).quota.tenant)})

    @reads(app, "/v1/models/{model:path}")
    async def model(model: str, request: Request) -> Response:
        return json_response(parts.served.card(model, context_of(request).quota.tenant))

    schemas: list[type] = [dialect.schema for dialect in parts.dialects]
    schemas += [counter.schema for counter in parts.counters]
    describe(app, [*schemas, BatchRequest])
    return app


async def _handle(
    handler: RequestHandler,
    dialect: Dialect,
    session: Callable[[], Session] | None,
    request: Request,
    receive: Receive,
    send: Send,
) -> None:
    await handler.handle(dialect, request, receive, send, None if session is None else session())


def _add_post(
    app: FastAPI, path: str, schema: type, handle: Callable[[Request, Receive, Send], Awaitable[None]]
) -> None:
    @app.post(path, openapi_extra={"requestBody": body_of(schema)})
    async def ask(request: Request) -> Response:
        return DirectResponse(partial(handle, request))


def _add_responses(app: FastAPI, responses: StoredResponses) -> None:
    @app.get("/v1/responses/{name}")
    async def retrieve(name: str, request: Request) -> Response:
        if is_stream(request):
            return DirectResponse(partial(responses.stream, name, request))
        return await responses.retrieve(name, request)

    @app.delete("/v1/responses/{name}")
    async def delete(name: str, request: Request) -> Response:
        return await responses.delete(name, request)

    @app.post("/v1/responses/{name}/cancel")
    async def cancel(name: str, request: Request) -> Response:
        return await responses.cancel(name, request)

    @reads(app, "/v1/responses/{name}/input_items")
    async def input_items(name: str, request: Request) -> Response:
        return await responses.input_items(name, request)


def _add_files(app: FastAPI, files: FileRoutes) -> None:
    fields = {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": [INPUT]}}
    form = {"type": "object", "required": ["file", "purpose"], "properties": fields}
    body = {"content": {"multipart/form-data": {"schema": form}}, "required": True}

    @app.post(FILES, openapi_extra={"requestBody": body})
    async def upload(request: Request) -> Response:
        return await files.upload(request)

    @reads(app, FILES)
    async def listed(request: Request) -> Response:
        return await files.list(request)

    @reads(app, FILES + "/{name}")
    async def describe(name: str, request: Request) -> Response:
        return await files.describe(name, request)

    @app.delete(FILES + "/{name}")
    async def delete(name: str, request: Request) -> Response:
        return await files.delete(name, request)

    @reads(app, FILES + "/{name}/content")
    async def content(name: str, request: Request) -> Response:
        return DirectResponse(partial(files.content, name, request))


def _add_batches(app: FastAPI, batches: BatchRoutes) -> None:
    _add_post(app, BATCHES, BatchRequest, batches.create)

    @reads(app, BATCHES)
    async def listed(request: Request) -> Response:
        return await batches.list(request)

    @reads(app, BATCHES + "/{name}")
    async def describe(name: str, request: Request) -> Response:
        return await batches.describe(name, request)

    @app.post(BATCHES + "/{name}/cancel")
    async def cancel(name: str, request: Request) -> Response:
        return await batches.cancel(name, request)


def _add_kept(app: FastAPI, resumption: Resumption, kept: Kept) -> None:
    @app.get(kept.path + "/{name}/events")
    async def events(name: str, request: Request) -> Response:
        return DirectResponse(partial(resumption.stream, kept, name, request))

    @reads(app, kept.path + "/{name}")
    async def answer(name: str, request: Request) -> Response:
        return DirectResponse(partial(resumption.fetch, kept, name, request))

    @app.post(kept.path + "/{name}/cancel")
    async def cancel(name: str, request: Request) -> Response:
        return json_response(await resumption.cancel(kept, name, request))


def paths(app: FastAPI) -> list[str]:
    """Return the paths of the routes."""
    return list(app.openapi()["paths"])


def _add_health(app: FastAPI, ready: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    @reads(app, "/health/live")
    @reads(app, "/ping")
    @app.post("/ping")
    async def alive() -> Response:
        return json_response({"status": "alive"})

    @reads(app, "/health")
    @reads(app, "/health/ready")
    async def is_ready() -> Response:
        report = await ready()
        return json_response(report, 503 if report["missing"] else 200)


def _add_errors(app: FastAPI, bodies: FailureBodies, count_refusal: Callable[[str, str, Failure], None]) -> None:
    def response(request: Request, failure: Failure, headers: Mapping[str, str] | None = None) -> Response:
        count_refusal(request.method, request.url.path, failure)
        return error_response(failure, headers, bodies.of(request.url.path))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        release_frames(error)
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

    @app.exception_handler(ClientDisconnect)
    async def left(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # there is nobody to tell; metrics count it as they count all who leave

    @app.exception_handler(RedisError)
    async def unreachable(request: Request, error: RedisError) -> Response:
        release_frames(error)
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
