"""`/docs`: Swagger UI for the OpenAPI document, served without any other host.

Swagger UI's files come from the package `fastapi-swagger`.
"""

from __future__ import annotations

from importlib import resources
from typing import Final

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response

from jobs.errors import NotFound

router = APIRouter(include_in_schema=False)

_PACKAGE: Final = "fastapi_swagger"
_FILES: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
_HEADERS: Final = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}


@router.get("/docs")
def page() -> HTMLResponse:
    """Return the HTML of Swagger UI."""
    shown = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="bASIC API",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon-32x32.png",
        swagger_ui_parameters={"validatorUrl": None},  # off: it would call another host
    )
    return HTMLResponse(shown.body, headers=_HEADERS)


@router.get("/docs/{name}")
def part(name: str) -> Response:
    """Return a script, style sheet or icon of Swagger UI."""
    if name not in _FILES:
        raise NotFound(f"Unknown file {name[:80]!r}.")
    try:
        data = (resources.files(_PACKAGE) / "resources" / name).read_bytes()
    except ModuleNotFoundError as exc:
        raise NotFound("This page needs the package fastapi-swagger: `pip install 'basic-batch[api]'`.") from exc
    return Response(data, media_type=_FILES[name], headers={"cache-control": "max-age=3600"})
