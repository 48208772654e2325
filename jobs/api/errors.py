"""Turn every exception into a response with OpenAI's error object."""

from __future__ import annotations

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jobs.api.request_ids import REQUEST_ID_HEADER, request_id
from jobs.errors import (
    BasicError,
    DatabaseReadOnly,
    DatabaseUnavailable,
    InvalidValue,
    LimitReached,
    RequestFailed,
    ServiceUnavailable,
    StorageFull,
)
from jobs.openai.errors import error_body
from storage.session import DATABASE_UNAVAILABLE, is_full, is_read_only, unavailable_reason

log = logging.getLogger(__name__)

_RETRY_AFTER_S = {503: "3", 507: "30"}  # status -> seconds


def install(app: FastAPI) -> None:
    """Register the exception handlers."""
    app.add_exception_handler(BasicError, _on_basic_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    for unavailable in DATABASE_UNAVAILABLE:
        app.add_exception_handler(unavailable, _on_database_unavailable)
    app.add_exception_handler(MemoryError, _on_memory_short)
    app.add_exception_handler(Exception, _on_bug)


def reply(error: BasicError) -> JSONResponse:
    """Return the response for a BasicError."""
    status = error.status_code
    body = error_body(status, error.message, error.param, error.code)
    return JSONResponse(body, status, _headers(error))


def database_unavailable(error: Exception) -> JSONResponse:
    """Return the response for a database that is unavailable, read-only or out of disk space."""
    log.warning("The database does not answer: %s", unavailable_reason(error), extra={"action": "database_unavailable"})
    if is_full(error):
        return reply(StorageFull())
    return reply(DatabaseReadOnly() if is_read_only(error) else DatabaseUnavailable())


def _headers(error: BasicError) -> dict[str, str]:
    if isinstance(error, RequestFailed):
        return {"x-should-retry": "false"}  # already retried by the workers, or cancelled
    match error.status_code:
        case 401:
            return {"www-authenticate": "Bearer"}
        case 409:
            return {"x-should-retry": "false"}  # the openai client retries conflicts by default
        case 429 if isinstance(error, LimitReached):
            return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        case status if status in _RETRY_AFTER_S:
            return {"retry-after": _RETRY_AFTER_S[status]}
        case _:
            return {}


async def _on_basic_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BasicError)
    return reply(error)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.status_code, error.detail), error.status_code, error.headers)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(part for part in first["loc"][1:] if isinstance(part, str)) or None  # no index of a repeated one
    return reply(InvalidValue(first["msg"].replace("Input should", "must"), param=param))


async def _on_database_unavailable(request: Request, error: Exception) -> JSONResponse:
    return database_unavailable(error)


async def _on_memory_short(request: Request, error: Exception) -> JSONResponse:
    log.warning("Not enough memory for a request", extra={"action": "memory_short"})
    return reply(ServiceUnavailable("The service is short of memory; try again in a few seconds."))


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    """Answer an unexpected exception; uvicorn logs the traceback. Runs outside the middleware: adds the id."""
    body = error_body(500, "Internal server error.")
    return JSONResponse(body, 500, {REQUEST_ID_HEADER: request_id(request.scope)})
