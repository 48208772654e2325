"""Read the values that a request carries to its output: the field `keep`."""

from __future__ import annotations

import json
from typing import Any, Final

from jobs.errors import InvalidValue
from jobs.submission.values import holds_nul, kind

MAX_KEPT_VALUES: Final = 64
MAX_KEPT_CHARS: Final = 16_384  # of all values of one request, as JSON


def read_keep(value: Any) -> dict[str, Any]:
    """Return the values to carry, by name; raise InvalidValue if they are no object, or too large."""
    if not isinstance(value, dict):
        raise InvalidValue(f"must be an object, not {kind(value)}", param="keep")
    written = json.dumps(value, ensure_ascii=False)
    if len(value) > MAX_KEPT_VALUES or len(written) > MAX_KEPT_CHARS:
        raise InvalidValue(
            f"has {len(value)} values and {len(written)} characters as JSON; the limits are {MAX_KEPT_VALUES} and "
            f"{MAX_KEPT_CHARS}",
            param="keep",
        )
    if holds_nul(written):
        raise InvalidValue("The character U+0000 is not allowed.", param="keep")
    return value
