"""The HTTP endpoints, on FastAPI.

Decisions: no documentation pages, for they would answer without the key. An answer whose client has gone is
cancelled, whether it is streamed or not. Every refusal has OpenAI's form, those of FastAPI itself included.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from moe_medical.serving.protocol import (
    AdapterRequest,
    ApiError,
    ChatRequest,
    GenerationRequest,
    Reply,
    TextRequest,
    bad_input,
)
from moe_medical.serving.service import Answer, Service

_CLIENT_GONE = 499
"""nginx's status for it; nobody is there to read it."""


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The endpoints of a service; with a key, /v1 asks for it as a bearer token."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _refusal)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return service.health()

    app.include_router(_routes(service), prefix="/v1", dependencies=[Depends(_key_check(api_key))])
    return app


def _routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        entries = [{"id": name, "object": "model", "owned_by": "moe-medical"} for name in service.models()]
        return {"object": "list", "data": entries}

    @routes.post("/chat/completions")
    async def chat(asked: ChatRequest, http: Request) -> Response:
        return await _answer(service, asked, Reply("chat", asked.model), http)

    @routes.post("/completions")
    async def text(asked: TextRequest, http: Request) -> Response:
        return await _answer(service, asked, Reply("text", asked.model), http)

    @routes.post("/adapters")
    def load(adapter: AdapterRequest) -> dict[str, Any]:  # not async: it runs beside the event loop
        service.add_adapter(adapter.name, adapter.path)
        return {"id": adapter.name, "object": "model", "loaded": True}

    @routes.delete("/adapters/{name}")
    def unload(name: str) -> dict[str, Any]:
        service.remove_adapter(name)
        return {"id": name, "object": "model", "deleted": True}

    return routes


async def _answer(service: Service, asked: GenerationRequest, reply: Reply, http: Request) -> Response:
    answer = service.begin(asked)
    if asked.stream:  # Starlette ends the generator, and that cancels the answer, when the client goes
        events = _events(answer, reply, asked.with_usage)
        return StreamingResponse(events, media_type="text/event-stream")
    text = asyncio.ensure_future(answer.whole())
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({text, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not text.done():
            return Response(status_code=_CLIENT_GONE)
    finally:
        # However the wait has ended (the server may be stopped in it), nothing goes on without a reader.
        answer.cancel()
        text.cancel()
        gone.cancel()
    if answer.reason == "error":
        raise _failed()
    return JSONResponse(reply.whole(text.result(), answer.reason, answer.usage))


async def _events(answer: Answer, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: pieces as they come, how it ended, the usage if wanted, `[DONE]`."""
    first = True  # an answer may have no piece at all: then its end is the first event
    async for piece in answer.pieces():
        yield _event(reply.piece(piece, first=first))
        first = False
    if answer.reason == "error":
        yield _event(_failed().body())
        return
    yield _event(reply.piece(reason=answer.reason, first=first))
    if with_usage:
        yield _event(reply.usage(answer.usage))
    yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _disconnected(http: Request) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _key_check(api_key: str | None) -> Callable[..., Awaitable[None]]:
    """A dependency that lets a request pass; FastAPI reads its parameters from its annotations."""

    async def check(authorization: Annotated[str, Header()] = "") -> None:
        given = authorization.removeprefix("Bearer ")
        # In constant time, so that how long it takes tells nothing of the key.
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise ApiError(401, "the bearer token must be the server's API key", "invalid_api_key")

    return check


def _failed() -> ApiError:
    return ApiError(500, "the answer could not be made; see the server's log", "internal_error")


async def _refusal(_: Request, error: Exception) -> JSONResponse:
    """The response to our own errors, to pydantic's about a body, and to Starlette's (no such path, say)."""
    if isinstance(error, RequestValidationError):
        refused = bad_input(list(error.errors()))
    elif isinstance(error, HTTPException):
        refused = ApiError(error.status_code, str(error.detail), "invalid_request")
        return JSONResponse(refused.body(), refused.status, headers=error.headers)
    else:
        assert isinstance(error, ApiError), f"no handler was asked for {type(error).__name__}"
        refused = error
    return JSONResponse(refused.body(), refused.status)
