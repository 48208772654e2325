"""Tokens a second over time, from what each minute wrote: the same for the page, the report and `--plot`.

Pure. A minute counts with the seconds of it in which work was done, so that a job of four seconds is as fast in the
picture as in the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

MINUTE_S: Final = 60
_SHORT_S: Final = 1.0  # of work: too little to tell a rate, where the minute beside it tells one


def rates(minutes: Iterable[tuple[int, int, float]], most: int) -> tuple[int, list[tuple[int, float]]]:
    """Return how many minutes a stretch has, and each stretch's first second and tokens a second.

    `minutes` are (Unix second at which it begins, tokens, seconds of work). The stretches follow each other without a
    gap, `most` at most; where nothing was written, the rate is 0.
    """
    found = {begin // MINUTE_S: (tokens, busy_s) for begin, tokens, busy_s in minutes}
    if not found:
        return 1, []
    first, last = min(found), max(found)
    together = -(-(last + 1 - first) // most)
    sums = [(0, 0.0)] * ((last - first) // together + 1)
    for minute, (tokens, busy_s) in found.items():
        place = (minute - first) // together
        sums[place] = (sums[place][0] + tokens, sums[place][1] + busy_s)
    seconds = together * MINUTE_S
    return together, [(first * MINUTE_S + place * seconds, _rate(sums, place, seconds)) for place in range(len(sums))]


def _rate(sums: list[tuple[int, float]], place: int, seconds: int) -> float:
    """Return the rate of a stretch; where work took but a moment of it, together with the stretch beside it.

    Steps are dated by the clock of the worker and work by the database's, so what a stretch has may belong next door.
    """
    tokens, busy_s = sums[place]
    if tokens and busy_s < _SHORT_S:
        beside = next((sums[at] for at in (place - 1, place + 1) if 0 <= at < len(sums) and sums[at][0]), (0, 0.0))
        tokens, busy_s = tokens + beside[0], busy_s + beside[1]
    return tokens / (busy_s or seconds)
