"""The routes, and how every error leaves them."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.telemetry import TelemetryConfig
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.completions import ChatCompletions
from services.gateway.errors import QUEUE_DOWN, UNEXPECTED, error_response, http_failure
from services.gateway.model_names import ModelNames
from services.gateway.returns import Returns
from services.gateway.schemas import ChatRequest
from shared.errors import RequestError

OWNER = "Baidu"
# FastAPI's own would wrap every chunk of a stream, and its logs hold what failed validation. Ours is in edge.py.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


class ModelCard(msgspec.Struct, frozen=True):
    """An entry of GET /v1/models."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = OWNER
    root: str = ""


class Models(msgspec.Struct, frozen=True):
    """The one model under all its names."""

    names: ModelNames
    created: int
    max_model_len: int

    def card(self, name: str) -> ModelCard:
        """Describe the model under a name.

        Raises:
            RequestError: 404, nobody may call it that.
        """
        return ModelCard(id=self.names.resolve(name), created=self.created, max_model_len=self.max_model_len)

    def cards(self) -> list[ModelCard]:
        return [self.card(name) for name in self.names.listed]


class Written(Response):
    """A response that writes itself: FastAPI hands it the connection, and nothing stands between it and the client."""

    def __init__(self, write: Callable[[Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._write(receive, send)


def routes(
    completions: ChatCompletions, returns: Returns, served: Models, ready: Callable[[], Awaitable[dict[str, Any]]]
) -> FastAPI:
    """The application; `ready` is asked what the health routes report."""
    app = FastAPI(title="Millrace", docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY)
    _add_errors(app)
    _add_health(app, ready)
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}}, "required": True}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": body})
    async def chat_completions(request: Request) -> Response:
        return Written(partial(completions.handle, request))

    @app.get("/v1/chat/completions/{name}/events")
    async def events(name: str, request: Request) -> Response:
        return Written(partial(returns.events, name, request))

    @app.get("/v1/chat/completions/{name}")
    async def answer(name: str, request: Request) -> Response:
        return Written(partial(returns.answer, name, request))

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": served.cards()})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        return _json(served.card(model))

    _describe(app)
    return app


def paths(app: FastAPI) -> list[str]:
    """The paths of the routes."""
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


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_request: Request, error: RequestError) -> Response:
        return error_response(error.failure)

    @app.exception_handler(HTTPException)
    async def unrouted(_request: Request, error: HTTPException) -> Response:
        return error_response(http_failure(error.status_code, error.detail), error.headers)

    @app.exception_handler(RedisError)
    async def unreachable(_request: Request, _error: RedisError) -> Response:
        return error_response(QUEUE_DOWN)

    @app.exception_handler(Exception)
    async def unexpected(_request: Request, _error: Exception) -> Response:
        return error_response(UNEXPECTED)


def _describe(app: FastAPI) -> None:
    """FastAPI's description of the routes, with the schema of a chat request, which is not pydantic's."""
    described = app.openapi()
    _, components = msgspec.json.schema_components([ChatRequest], ref_template="#/components/schemas/{name}")
    described.setdefault("components", {}).setdefault("schemas", {}).update(components)
    app.openapi_schema = described


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
