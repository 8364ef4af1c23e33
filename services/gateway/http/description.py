"""Description of the API at /openapi.json: FastAPI's, with msgspec's types of bodies, queries and statuses."""

from collections.abc import Collection, Iterable
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI

from services.gateway.request.tokens import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest

REF = "#/components/schemas/{name}"
# Both families of APIs write errors so, with more in them.
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
        }
    },
}
_TEXT, _NUMBER = {"type": "string"}, {"type": "integer", "minimum": 1}
_PAGE = {"limit": _NUMBER, "order": {"type": "string", "enum": ["asc", "desc"]}, "after": _TEXT}
_QUERIES: dict[str, dict[str, Any]] = {
    "/v1/files": {**_PAGE, "purpose": _TEXT},
    "/v1/batches": _PAGE,
    "/v1/responses/{name}/input_items": _PAGE,
    "/v1/responses/{name}": {"stream": {"type": "boolean"}, "starting_after": {"type": "integer", "minimum": 0}},
}
_BODIES: dict[str, tuple[type, ...]] = {
    "/tokenize": (TokenizeRequest, TokenizeChatRequest),
    "/detokenize": (DetokenizeRequest,),
}
ANYWHERE = (401, 429, 500, 503)
WITH_NAME = (400, 404)
WITH_BODY = (400, 403, 404, 408, 409, 413, 415, 504)
READY = ("/health", "/health/ready")
_FASTAPIS = ("HTTPValidationError", "ValidationError")


def describe(app: FastAPI, schemas: Collection[type]) -> None:
    """Write the description; `schemas` are the types of the bodies that routes refer to by name."""
    described = app.openapi()
    types = [*schemas, *(each for body in _BODIES.values() for each in body)]
    _, components = msgspec.json.schema_components(types, ref_template=REF)
    known = described.setdefault("components", {}).setdefault("schemas", {})
    known.update(components)
    known["Error"] = _ERROR
    for name in _FASTAPIS:  # of its own checks, which no route of ours has
        known.pop(name, None)
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            _describe(path, method, operation)
    app.openapi_schema = described


def body_of(*schemas: type) -> dict[str, Any]:
    """Return the description of a JSON body of one of these types."""
    refs = [{"$ref": REF.format(name=schema.__name__)} for schema in schemas]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"content": {"application/json": {"schema": schema}}, "required": True}


def _describe(path: str, method: str, operation: dict[str, Any]) -> None:
    if path in _BODIES:
        operation["requestBody"] = body_of(*_BODIES[path])
    if method == "get" and path in _QUERIES:
        queries = [{"name": name, "in": "query", "schema": schema} for name, schema in _QUERIES[path].items()]
        operation["parameters"] = [*operation.get("parameters", ()), *queries]
    responses = operation["responses"]
    responses.pop("422", None)
    for status in sorted(_statuses(path, operation)):
        schema = (
            {} if path in READY and status == HTTPStatus.SERVICE_UNAVAILABLE else {"$ref": REF.format(name="Error")}
        )
        content = {"application/json": {"schema": schema}}
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": content}
    if "text/event-stream" not in responses["200"]["content"] and _may_stream(path):
        # Of no type: some take it for the whole text, and others for each event.
        responses["200"]["content"]["text/event-stream"] = {"schema": {"description": "Server-sent events."}}
    if method == "get" and path.endswith("/completions/{name}"):
        responses["202"] = {"description": "Accepted", "content": {"application/json": {"schema": {}}}}


def _statuses(path: str, operation: dict[str, Any]) -> Iterable[int]:
    found = set(ANYWHERE)
    if operation.get("parameters"):
        found.update(WITH_NAME)
    if "requestBody" in operation:
        found.update(WITH_BODY)
    if path.endswith(("/cancel", "/{model}")):
        found.update((403, 409))
    return found


def _may_stream(path: str) -> bool:
    return path.endswith(("/completions", "/messages", "/responses", "/events")) or path == "/v1/responses/{name}"
