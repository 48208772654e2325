"""Read and write durations and times the way people do."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Final

_UNIT_S: Final = {"m": 60, "h": 3_600, "d": 86_400}
_DURATION: Final = re.compile(r"(0|[1-9][0-9]*)([mhd])")


def parse_duration_s(text: str, *, max_digits: int = 5, zero: bool = False) -> float:
    """Return the seconds of a number and its unit, such as `30d`; raise ValueError for any other text."""
    found = _DURATION.fullmatch(text)
    if found is None or len(found[1]) > max_digits or (found[1] == "0" and not zero):
        raise ValueError(f"{text[:40]!r} is not a number of up to {max_digits} digits followed by m, h or d")
    return float(int(found[1]) * _UNIT_S[found[2]])


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units of hours, minutes and seconds."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def age_text(at: float, now: float) -> str:
    """Return how long ago a Unix time was, in its largest unit. The clocks of client and server may differ."""
    age_s = max(0.0, now - at)
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if age_s >= unit_s:
            return f"{age_s // unit_s:.0f} {unit} ago"
    return f"{age_s:.0f} s ago"


def local_time(at: float) -> str:
    """Return a Unix time as date, time and zone of this machine."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
