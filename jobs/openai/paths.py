"""The endpoint that a path or url names: OpenAI's spellings, and those of Azure, whose paths can name a model too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, get_args
from urllib.parse import urlsplit

from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, RESPONSES_ENDPOINT, Endpoint

_ENDPOINTS: Final[tuple[Endpoint, ...]] = get_args(Endpoint)
_PROMPTS: Final[Mapping[str, Endpoint]] = {
    "messages": CHAT_ENDPOINT,
    "prompt": COMPLETIONS_ENDPOINT,
    "input": RESPONSES_ENDPOINT,
}
AZURE_PREFIX: Final = "/openai/"
_DEPLOYMENT: Final = re.compile(r"deployments/(?P<model>.+?)/(?P<rest>(?:chat/)?completions|responses)")


class PublicPath(NamedTuple):
    """A path of the API, and the model that an Azure path names as its deployment."""

    path: str
    deployment: str | None = None


def public_path(path: str) -> PublicPath:
    """Return the path below /v1 that an Azure path means, without a trailing slash; other paths as they are.

    Azure's client calls /openai/deployments/MODEL/chat/completions, /openai/files and, newer, /openai/v1/files.
    """
    path = path.rstrip("/") or "/"
    if not path.startswith(AZURE_PREFIX):
        return PublicPath(path)
    rest = path.removeprefix(AZURE_PREFIX)
    if found := _DEPLOYMENT.fullmatch(rest):
        return PublicPath(f"/v1/{found['rest']}", found["model"])
    return PublicPath(f"/v1/{rest.removeprefix('v1/')}")


def endpoint_of_url(url: Any) -> Endpoint | None:
    """Return the endpoint of a url or path, also with a host, a query, a trailing slash, or without /v1."""
    try:
        path = public_path(urlsplit(url).path).path if isinstance(url, str) else ""
    except ValueError:
        return None
    return next((endpoint for endpoint in _ENDPOINTS if path in (endpoint, endpoint.removeprefix("/v1"))), None)


def endpoint_of_line(line: Any) -> Endpoint | None:
    """Return the endpoint of a batch line: that of its url, else that of its body, as Together and Mistral write it."""
    body = line.get("body") if isinstance(line, dict) else None
    if not isinstance(body, dict):
        return None
    if line.get("url") is not None:
        return endpoint_of_url(line["url"])
    return next((endpoint for name, endpoint in _PROMPTS.items() if body.get(name) is not None), None)
