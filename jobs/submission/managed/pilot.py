"""Check the pilot of a submission: the requests that run first (storage.pilots)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from jobs.errors import InvalidValue
from jobs.submission.values import refuse_unknown

MAX_PILOT_REQUESTS: Final = 10_000


@dataclass(frozen=True, slots=True)
class PilotSize:
    """Which requests of a job are its pilot."""

    requests: int | None  # None: a hundredth of the job, within limits
    seed: int = 0


def check_pilot(given: Any) -> PilotSize | None:
    """Return the pilot that is asked for: True, a number of requests, or an object with `requests` and `seed`."""
    if given is None or given is False:
        return None
    fields = {"requests": None if given is True else given} if not isinstance(given, Mapping) else given
    refuse_unknown(fields, {"requests", "seed"}, "pilot.")
    requests, seed = fields.get("requests"), fields.get("seed", 0)
    if requests is not None and (type(requests) is not int or not 1 <= requests <= MAX_PILOT_REQUESTS):
        raise InvalidValue(f"must be true, or a whole number from 1 to {MAX_PILOT_REQUESTS}", param="pilot")
    if type(seed) is not int:
        raise InvalidValue("must be a whole number", param="pilot.seed")
    return PilotSize(requests, seed)
