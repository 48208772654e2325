"""From an error response of the service to the exception that the client raises."""

from __future__ import annotations

from collections.abc import Iterator

import httpx

from jobs.errors import (
    BasicError,
    InvalidKey,
    JobRefused,
    LimitReached,
    NotCancellable,
    NotFound,
    NotPermitted,
    ServiceUnavailable,
)

_BY_STATUS_CODE: dict[int, type[BasicError]] = {
    401: InvalidKey,
    403: NotPermitted,
    404: NotFound,
    409: NotCancellable,
    429: LimitReached,
    503: ServiceUnavailable,
}


def error_of(response: httpx.Response) -> BasicError:
    """Return the exception of an error response: by its error code, else by its status code."""
    try:
        error = response.json()["error"]
        message, code, param = error["message"], error["code"], error["param"]
    except (ValueError, KeyError, TypeError):
        message, code, param = f"The service answered {response.status_code} {response.reason_phrase}.", None, None
    return _error_class(response.status_code, code)(message, param=param)


def _error_class(status_code: int, code: str | None) -> type[BasicError]:
    fallback = _BY_STATUS_CODE.get(status_code, JobRefused if status_code < 500 else BasicError)
    return next((kind for kind in _class_tree(BasicError) if code is not None and kind.code == code), fallback)


def _class_tree(root: type[BasicError]) -> Iterator[type[BasicError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _class_tree(kind)
