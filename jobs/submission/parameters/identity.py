"""The identity of a request: a hash of everything that decides its answer, beside the worker that computes it.

Requests with one identity get one answer, computed once (storage.cached_answers). The hash is over the stored request,
as JSON, with its owner, model and endpoint. It leaves out what is no part of an answer: the values that a caller keeps,
options of the answer's object, and the seed where nothing is drawn. The order of names counts, as chat templates show
tools in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from jobs.messages import GenerationRequest
from jobs.settings import JobsSettings
from jobs.submission.values import boolean
from storage import keys
from storage.progress.json_text import to_json
from storage.session import Database

IDENTITY_SEED: Final = "identity"  # the value of `seed` that asks for a seed from the request itself
_HEX_DIGITS: Final = 32
_NO_PART: Final = frozenset({"keep", "response"})  # of an answer


def cache_option(asked: Mapping[str, Any]) -> dict[str, bool]:
    """Return `cache` of a body; raise InvalidValue if it is neither true nor false."""
    return {"cache": boolean(asked["cache"], "cache")} if "cache" in asked else {}


def cache_default(database: Database, settings: JobsSettings, owner: str | None) -> bool | None:
    """Return what `cache` is for requests of an owner that do not set it; None: they are always computed."""
    if settings.cache == "off":
        return None
    if owner:
        with database.connect() as connection:
            if not keys.may_cache(connection, owner):
                return None
    return settings.cache == "on"


def identity_of(
    request: GenerationRequest, endpoint: str, owner: str, given: Mapping[str, Any], default: bool | None
) -> str | None:
    """Return the identity of a request; None if no other has its answer, or if it must be computed in any case.

    `given` are its parameters and those of its job. A seed that the service has chosen is one that no other request
    has. A temperature of 0 counts only if it is given: a default is the worker's, and not known yet.
    """
    if default is None or not given.get("cache", default) or request.sampling.record_trees:
        return None
    greedy = "temperature" in request.sampling.model_fields_set and request.sampling.temperature == 0
    if not greedy and "seed" not in given:
        return None
    return _digest(request, endpoint, owner, seeded=not greedy).hex()[:_HEX_DIGITS]


def with_identity_seed(request: GenerationRequest, endpoint: str) -> GenerationRequest:
    """Return a request with the seed that follows from all the rest of it, the same for every owner."""
    digest = _digest(request, endpoint, "", seeded=False)
    seed = int.from_bytes(digest[:8], "big") >> 1  # 63 bits fit a signed 64-bit integer
    return request.model_copy(update={"sampling": request.sampling.model_copy(update={"seed": seed})})


def _digest(request: GenerationRequest, endpoint: str, owner: str, *, seeded: bool) -> bytes:
    stored = {name: value for name, value in request.stored().items() if name not in _NO_PART}
    left_out = {"record_trees"} if seeded else {"record_trees", "seed"}
    stored["sampling"] = {name: value for name, value in stored["sampling"].items() if name not in left_out}
    return hashlib.sha256(to_json((owner, endpoint, stored)).encode()).digest()
