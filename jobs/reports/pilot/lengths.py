"""How long the texts of a job will be, from those of its pilot.

Lengths follow the Kaplan-Meier estimate (1958): a text that was cut at its `max_tokens` has at least that many tokens,
which matters for requests with a higher one. Requests are grouped by size, because long prompts often have other
answers than short ones.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from math import sqrt
from random import Random
from typing import Final

_GROUP_REQUESTS: Final = 24  # pilot requests that make one more group by size
_MAX_GROUPS: Final = 4
_POISSON: Final = (0.368, 0.368, 0.184, 0.061, 0.019)  # how often a case with a mean of one occurs 0 to 4 times


@dataclass(frozen=True, slots=True)
class PilotText:
    """A text of the pilot."""

    tokens: int
    cut: bool  # at max_tokens or the context's end: it would have had more


@dataclass(frozen=True, slots=True)
class PilotRequest:
    """A request of the pilot that has ended."""

    size: int  # characters of the stored request: known of all requests, before they are tokenized
    prompt_tokens: int
    texts: tuple[PilotText, ...]
    repeats: bool = False  # its prompt is that of an earlier request of the pilot


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request that has not run."""

    size: int
    texts: int
    max_tokens: int | None  # None: only the context bounds it
    repeats: bool = False  # its prompt is that of a request of the pilot, or of an earlier open one


class LengthCurve:
    """Survival curve of text lengths."""

    def __init__(self, texts: Iterable[PilotText]) -> None:
        """Fit the curve; without a text that ended by itself, all are as long as they may be."""
        counts = Counter((text.tokens, text.cut) for text in texts)
        left, alive = sum(counts.values()), 1.0
        self._tokens: list[int] = []  # lengths at which the survival falls, ascending
        self._alive: list[float] = []  # after them
        for tokens, cut in sorted(counts):  # of equals, those that ended come first
            if not cut:
                alive *= 1 - counts[tokens, cut] / left
                self._tokens.append(tokens)
                self._alive.append(alive)
            left -= counts[tokens, cut]
        self._longest = max((tokens for tokens, _ in counts), default=0)
        widths = [b - a for a, b in zip([0, *self._tokens], self._tokens, strict=False)]
        self._areas = list(accumulate(w * s for w, s in zip(widths, [1.0, *self._alive], strict=False)))
        squares = [b * b - a * a for a, b in zip([0, *self._tokens], self._tokens, strict=False)]
        self._moments = list(accumulate(w * s for w, s in zip(squares, [1.0, *self._alive], strict=False)))

    def mean(self, max_tokens: int | None) -> float:
        """Return the mean length of texts with this limit: the area below the curve up to it.

        Beyond the longest text that was seen, the curve is 0 without a limit, and stays as it is with one.
        """
        end, at = self._end(max_tokens)
        area = self._areas[at - 1] if at else 0.0
        return area + (end - (self._tokens[at - 1] if at else 0)) * (self._alive[at - 1] if at else 1.0)

    def variance(self, max_tokens: int | None) -> float:
        """Return the variance of the length: twice the area of length times survival, less the mean squared."""
        end, at = self._end(max_tokens)
        moment = self._moments[at - 1] if at else 0.0
        moment += (end**2 - (self._tokens[at - 1] ** 2 if at else 0)) * (self._alive[at - 1] if at else 1.0)
        return max(0.0, moment - self.mean(max_tokens) ** 2)

    def _end(self, max_tokens: int | None) -> tuple[int, int]:
        """Return the length up to which the curve counts, and how many of its falls lie before."""
        end = self._longest if max_tokens is None else max_tokens
        return end, bisect_left(self._tokens, end)

    def quantile(self, share: float, max_tokens: int | None) -> int:
        """Return the length that this share of texts does not exceed."""
        end = self._longest if max_tokens is None else max_tokens
        at = bisect_right(self._alive, share - 1, key=lambda alive: -alive)
        return min(self._tokens[at], end) if at < len(self._tokens) else end


class JobLengths:
    """Predicted prompt and completion tokens of the open requests of a job."""

    def __init__(self, pilot: Sequence[PilotRequest], bounds: Sequence[int]) -> None:
        """Fit to the pilot, in groups of requests whose sizes are up to each of `bounds`, and beyond the last."""
        self._bounds = bounds
        groups: list[list[PilotText]] = [[] for _ in range(len(bounds) + 1)]
        for request in pilot:
            groups[self.group(request.size)] += request.texts
        everything = cache(lambda: LengthCurve(chain.from_iterable(groups)))
        self._curves = [LengthCurve(texts) if texts else everything() for texts in groups]
        self._base, self._slope = _line([(request.size, request.prompt_tokens) for request in pilot])

    def group(self, size: int) -> int:
        """Return the group of a request by its size."""
        return bisect_left(self._bounds, size)

    def prompt_tokens(self, size: float) -> float:
        """Return the prompt tokens of a request of this size."""
        return max(1.0, self._base + self._slope * size)

    def curve(self, request: OpenRequest) -> LengthCurve:
        """Return the curve of a request's texts."""
        return self._curves[self.group(request.size)]

    def totals(self, counts: Mapping[tuple[int, int | None], int], requests: int, size: int) -> tuple[float, float]:
        """Return prompt and completion tokens; `counts`: texts by group and limit, `size`: that of all requests."""
        completion = sum(n * self._curves[group].mean(limit) for (group, limit), n in counts.items())
        return (requests * self.prompt_tokens(size / requests) if requests else 0.0), completion

    def spread(self, squares: Mapping[tuple[int, int | None], int]) -> float:
        """Return the standard deviation of the completion tokens around their mean, as texts of a request go together.

        `squares`: the squares of the number of texts of each request, summed by group and limit.
        """
        return sqrt(sum(n * self._curves[group].variance(limit) for (group, limit), n in squares.items()))


def size_bounds(pilot: Sequence[PilotRequest]) -> list[int]:
    """Return the sizes that divide the pilot into groups of equal numbers."""
    groups = min(_MAX_GROUPS, max(1, len(pilot) // _GROUP_REQUESTS))
    sizes = sorted(request.size for request in pilot)
    return sorted({sizes[len(sizes) * group // groups] for group in range(1, groups)} - {sizes[-1]}) if sizes else []


def texts_by_group(
    requests: Iterable[OpenRequest], lengths: JobLengths, power: int = 1
) -> Counter[tuple[int, int | None]]:
    """Return the number of texts by group and limit; with `power`, of that power for each request."""
    counts: Counter[tuple[int, int | None]] = Counter()
    for request in requests:
        counts[lengths.group(request.size), request.max_tokens] += request.texts**power
    return counts


def unseen(pilot: Sequence[PilotRequest], limits: Sequence[int | None], draws: Random) -> list[PilotRequest]:
    """Return a few requests that a pilot may have missed: one on average, of any length up to the limit of an open one.

    A pilot whose texts were all cut would else be sure that all others are. As a prior of one observation (Rubin,
    The Bayesian bootstrap, 1981).
    """
    longest = max((text.tokens for request in pilot for text in request.texts), default=1)
    found = []
    for _ in range(draws.choices(range(5), _POISSON)[0]):
        like = draws.choice(pilot)
        limit = draws.choice(limits) or 2 * longest
        text = PilotText(draws.randint(1, limit), cut=False)
        found.append(PilotRequest(like.size, like.prompt_tokens, (text,) * len(like.texts)))
    return found


def _line(points: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return intercept and slope of the least-squares line; the mean if the sizes don't differ, or it would fall."""
    if not points:
        return 0.0, 0.0
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return (mean_y - slope * mean_x, slope) if slope > 0 else (mean_y, 0.0)
