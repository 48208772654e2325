"""Find the service that a client talks to: its URL and the API key for it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from jobs.local.key import read_local_key
from jobs.settings import JobsSettings

if TYPE_CHECKING:
    from jobs.local.state import LocalService


def default_api_url(settings: JobsSettings) -> str:
    """Return BASIC_API_URL, else the URL of the running `basic up`, else the default URL."""
    if "api_url" in settings.model_fields_set:
        return settings.api_url
    service = local_service(settings)
    return settings.api_url if service is None else service.api_url


def default_api_key(settings: JobsSettings, api_url: str) -> str:
    """Return BASIC_API_KEY, else the local key if the URL is that of the running `basic up`, else an empty string."""
    if settings.api_key:
        return settings.api_key
    service = local_service(settings)
    is_local = service is not None and service.api_url.rstrip("/") == api_url
    return read_local_key(settings.data_dir) if is_local else ""


def local_service(settings: JobsSettings) -> LocalService | None:
    """Return the service that `basic up` runs on this data directory, None if there is none."""
    if sys.platform == "win32":  # embedded mode needs file locks that Windows lacks
        return None
    from jobs.local.state import running_service

    return running_service(settings.data_dir)
