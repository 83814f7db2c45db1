"""The application: every route, the guard before them, errors in each protocol's words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from .. import __version__
from ..errors import CabochonError, RequestError
from ..llm import AsyncLLM
from .answers import Json, failure
from .faults import wire_fault
from .guard import UNANSWERED, Guard, Traffic
from .metrics import CONTENT_TYPE, render
from .options import ServerOptions
from .routes_anthropic import anthropic_routes
from .routes_openai import openai_routes
from .routes_responses import responses_routes
from .routes_speech import speech_routes
from .service import Service
from .sse import ClientGoneError

log = logging.getLogger("cabochon.server")
STATIC = Path(__file__).parent / "static"


def create_app(llm: AsyncLLM, options: ServerOptions, traffic: Traffic | None = None) -> FastAPI:
    """The server around one engine. `traffic.draining` closes it to new requests."""
    traffic = traffic or Traffic()
    service = Service(llm, options)
    app = FastAPI(
        title="Cabochon", version=__version__, docs_url=None, redoc_url=None, separate_input_output_schemas=False
    )
    app.state.service = service
    app.include_router(openai_routes(service))
    app.include_router(responses_routes(service))
    app.include_router(anthropic_routes(service))
    app.include_router(speech_routes(service))
    _plain_routes(app, service, traffic)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _error_handlers(app)
    _describe(app)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Guard, options=options, traffic=traffic)
    return app


def _plain_routes(app: FastAPI, service: Service, traffic: Traffic) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": ONLY_OURS})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(STATIC / "docs.html", headers={"Content-Security-Policy": ONLY_OURS})

    @app.get(
        "/health", summary="The engine is alive", tags=["Operation"], responses={503: {"description": "It has stopped"}}
    )
    async def health() -> Response:
        return Json({"status": "ok"}) if service.llm.alive else Json({"status": "stopped"}, 503)

    @app.get("/ping", summary="The same, as SageMaker asks", tags=["Operation"])
    @app.post("/ping", summary="The same, as SageMaker asks", tags=["Operation"])
    async def ping() -> Response:
        return await health()

    @app.get("/load", summary="How many replies are running or waiting", tags=["Operation"])
    async def load() -> Response:
        return Json({"server_load": service.replies})

    @app.get(
        "/ready", summary="New requests are taken", tags=["Operation"], responses={503: {"description": "Draining"}}
    )
    async def ready() -> Response:
        return Json({"status": "draining"}, 503) if traffic.draining else Json({"status": "ready"})

    @app.get("/version", summary="Version of the server", tags=["Operation"])
    async def version() -> Response:
        return Json({"version": __version__})

    @app.get("/metrics", summary="Counters for Prometheus", tags=["Operation"])
    async def metrics() -> Response:
        page = render(service.llm.stats, service.llm.gauges(), traffic, service.options.names[0])
        return Response(page, media_type=CONTENT_TYPE)


def _error_handlers(app: FastAPI) -> None:
    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, CabochonError)
        if error.status == 500:
            log.error("%s failed", request.state.request_id, exc_info=error)
        return failure(request, error)

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return failure(request, RequestError(*wire_fault(error.errors())))

    async def plain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, CabochonError):  # the guard's, met while the body was read
            return failure(request, error.__cause__)
        fault = RequestError(_PLAIN.get(error.status_code, str(error.detail)).format(path=request.url.path))
        answer = failure(request, fault)
        answer.status_code = error.status_code
        answer.headers.update(error.headers or {})
        return answer

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=UNANSWERED)

    app.add_exception_handler(CabochonError, ours)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(ClientGoneError, gone)


def _describe(app: FastAPI) -> None:
    """The OpenAPI description with our errors instead of FastAPI's own 422."""

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if path.startswith("/v1/") or "requestBody" in operation:
                        operation["responses"] |= {
                            str(status): {"description": what} for status, what in FAULTS.items()
                        }
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI's own documentation has it


ONLY_OURS = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",
        "media-src data:",
        "style-src 'self' 'unsafe-inline'",
        "frame-ancestors 'none'",
    )
)
"""What the page may load: its own files, and the pictures, sounds and videos that its user picked."""
FAULTS = {
    400: "Something in the request can't be served; the error names the field",
    401: "The key is missing or wrong",
    404: "No such model or response",
    413: "The body is too large",
    429: "Too many replies are waiting; Retry-After says when to come back",
    500: "A fault of the server's own",
    503: "The server is shutting down",
    504: "The reply took longer than allowed",
}
_PLAIN = {
    400: "The body can't be read as JSON.",
    404: "There is nothing at {path}; /docs lists what there is.",
    405: "This method is not for {path}; /docs lists what there is.",
}
