"""Acceptance profiles: how often, at which rank and with which probabilities a draft offers the target's next token.

A profile is recorded on a real pair, depth by depth. It can be tilted to another acceptance rate: then the rank of the
target's token is drawn from other frequencies, and the probabilities beside it follow by the rule for a shifted label
distribution (Saerens et al. 2002, Neural Computation 14, equation 2.4). So a tilted draft is as well calibrated as the
recorded one: a planner can't tell right candidates from wrong ones by their probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from jobs.errors import InvalidValue
from worker.engine.host.nodes import FloatArray
from worker.engine.segments import IntArray

FOLDER = Path(__file__).with_name("profiles")  # NAME.json: recorded profiles and published acceptance
FORMAT = "basic-acceptance-1"
_PROPOSALS = "acceptance must be a number from 0 to 1, the name of a profile, or the file of one"


@dataclass(frozen=True, slots=True, eq=False)
class RecordedDepth:
    """What a draft offered at one depth. Class r < k: rank of the target's token; class k: it was not offered."""

    counts: IntArray  # [k + 1] nodes on the target's path, by class
    shapes: tuple[FloatArray, ...]  # for each class [samples, k] probabilities of the candidates, by rank
    off_path: FloatArray  # [samples, k] the same at nodes that the target did not reach; may be empty

    @property
    def frequencies(self) -> FloatArray:
        """The share of each class [k + 1]."""
        shares: FloatArray = self.counts / self.counts.sum()
        return shares

    def tilted(self, rate: float | None) -> DepthDraws:
        """Return what to draw from if the first candidate is right with `rate`; None: as recorded."""
        recorded = self.frequencies
        wanted = recorded if rate is None else _tilted(recorded, rate)
        # A class without samples was never recorded: its share is 0 in both.
        sizes = np.array([len(some) for some in self.shapes])
        each = np.repeat(np.divide(wanted, sizes, out=np.zeros_like(wanted), where=sizes > 0), sizes)
        classes = np.repeat(np.arange(len(sizes)), sizes)
        weights = np.divide(wanted, recorded, out=np.zeros_like(wanted), where=recorded > 0)
        if not wanted[:-1].any():
            weights = np.ones_like(weights)  # a draft that is always wrong does not know it
        shapes = _shifted(np.concatenate(self.shapes), weights)
        off_path = _shifted(self.off_path, weights) if len(self.off_path) else shapes
        return DepthDraws(each.cumsum() / each.sum(), classes, shapes, off_path)


@dataclass(frozen=True, slots=True, eq=False)
class DepthDraws:
    """Samples of one depth with the probability of each."""

    cumulative: FloatArray  # [samples] probability of a sample or one before it; those with the first rank come first
    classes: IntArray  # [samples] rank of the target's token; k: not offered
    shapes: FloatArray  # [samples, k]
    off_path: FloatArray  # [others, k]

    def on_path(self, uniform: FloatArray) -> tuple[IntArray, FloatArray]:
        """Return classes [n] and probabilities [n, k] for uniform numbers [n] below 1."""
        drawn = np.minimum(np.searchsorted(self.cumulative, uniform, side="right"), len(self.classes) - 1)
        return self.classes[drawn], self.shapes[drawn]

    def off(self, uniform: FloatArray) -> FloatArray:
        """Return probabilities [n, k] of nodes that the target does not reach."""
        found: FloatArray = self.off_path[(uniform * len(self.off_path)).astype(np.int64)]
        return found


def _tilted(recorded: FloatArray, rate: float) -> FloatArray:
    """Return class frequencies with `rate` for the first rank.

    A later rank is right as often as recorded, among the nodes where the earlier ones are wrong; less often in
    proportion if the rate is below the recorded one. A better draft has better first candidates and no better others.
    """
    left = 1.0 - np.concatenate([[0.0], recorded[:-1].cumsum()])
    hazards = np.divide(recorded, left, out=np.zeros_like(recorded), where=left > 0)[:-1]
    scale = min(rate / recorded[0], 1.0) if recorded[0] else 1.0
    hazards = np.concatenate([[rate], hazards[1:] * scale])
    missed = np.concatenate([[1.0], (1.0 - hazards).cumprod()])
    return np.concatenate([hazards * missed[:-1], missed[-1:]])


def _shifted(shapes: FloatArray, weights: FloatArray) -> FloatArray:
    """Return probabilities [n, k] after class r has become `weights[r]` times as frequent; the last class: none."""
    scaled = shapes * weights[:-1]
    others = np.maximum(1.0 - shapes.sum(axis=1), 0.0) * weights[-1]
    shifted: FloatArray = scaled / np.maximum(scaled.sum(axis=1) + others, 1e-12)[:, None]
    return shifted


@dataclass(frozen=True, eq=False)
class AcceptanceProfile:
    """The acceptance of a draft by depth."""

    name: str
    recorded: tuple[RecordedDepth, ...]  # the last one holds for all deeper depths
    # Of the first candidate by depth, the last one for deeper; None: as recorded.
    rates: tuple[float, ...] | None = None

    @property
    def acceptance(self) -> float:
        """P(the first candidate below a root is the target's token)."""
        return float(self.recorded[0].frequencies[0]) if self.rates is None else self.rates[0]

    @property
    def width(self) -> int:
        """Candidates of each node."""
        return len(self.recorded[0].counts) - 1

    def at(self, depth: int) -> DepthDraws:
        """Return what to draw from below nodes of a depth; roots have depth 0."""
        return self._draws[min(depth, len(self._draws) - 1)]

    @cached_property
    def _draws(self) -> tuple[DepthDraws, ...]:
        depths = max(len(self.recorded), len(self.rates or ()))
        return tuple(self._recorded_at(depth).tilted(self._rate_at(depth)) for depth in range(depths))

    def _recorded_at(self, depth: int) -> RecordedDepth:
        return self.recorded[min(depth, len(self.recorded) - 1)]

    def _rate_at(self, depth: int) -> float | None:
        return None if self.rates is None else self.rates[min(depth, len(self.rates) - 1)]

    def with_rates(self, name: str, rates: Sequence[float]) -> Self:
        """Return the profile tilted to rates of the first candidate by depth. Raises InvalidValue."""
        if not rates or not all(0.0 <= rate <= 1.0 for rate in rates):
            raise InvalidValue(f"{name!r}: rates are numbers from 0 to 1", param="--acceptance")
        return type(self)(name, self.recorded, tuple(rates))


def read_recorded(file: Path) -> AcceptanceProfile:
    """Read a recorded profile; raises InvalidValue if the file is none."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise InvalidValue(f"{file} has the format {stored['format']!r}; record it again", param="--acceptance")
        return AcceptanceProfile(stored["name"], tuple(_depth(one) for one in stored["depths"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidValue(f"{file} is not an acceptance profile: {error}", param="--acceptance") from error


def _depth(stored: Mapping[str, Any]) -> RecordedDepth:
    counts = np.array(stored["counts"], np.int64)
    width = len(counts) - 1
    shapes = tuple(np.array(some, np.float64).reshape(-1, width) for some in stored["shapes"])
    off_path = np.array(stored["off_path"], np.float64).reshape(-1, width)
    if len(shapes) != len(counts) or not all(len(some) or not n for some, n in zip(shapes, counts, strict=True)):
        raise ValueError("a class of ranks has no samples")
    return RecordedDepth(counts, shapes, off_path)


def rate_of_length(length: float, draft_tokens: int) -> float:
    """Return the acceptance rate a, at each depth, of chains of `draft_tokens` tokens that emit `length` a step.

    Solves 1 + a + a^2 + … + a^n = length (Leviathan et al. 2023, arXiv 2211.17192, equation 1).
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**n for n in range(draft_tokens + 1)) < length else (low, middle)
    return low


def rates_of_positions(shares: Sequence[float]) -> tuple[float, ...]:
    """Return the rate at each depth from the share of steps that accept at least 1, 2, … tokens of a chain."""
    return tuple(share / before for before, share in zip((1.0, *shares[:-1]), shares, strict=True))


@cache
def _published() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
    return stored


def names() -> list[str]:
    """Return the names of the packaged profiles: recorded ones first."""
    return [*sorted(file.stem for file in FOLDER.glob("*.json") if file.stem != "published"), *_published()["profiles"]]


def profile_of(text: str) -> AcceptanceProfile:
    """Return a profile by the text of an option: a rate, the name of a packaged profile, or a file.

    A rate holds at every depth. It and published acceptance take ranks and probabilities from the recorded profile that
    published.json names. Raises InvalidValue.
    """
    text = text.strip()
    published = _published()
    if (FOLDER / f"{text}.json").is_file() and text != "published":
        return read_recorded(FOLDER / f"{text}.json")
    if text.endswith(".json"):
        return read_recorded(Path(text))
    base = read_recorded(FOLDER / f"{published['shapes']}.json")
    if text in published["profiles"]:
        return base.with_rates(text, _rates(published["profiles"][text]))
    try:
        return base.with_rates(text, (float(text),))
    except ValueError:
        raise InvalidValue(f"{text!r}: {_PROPOSALS}; there are {', '.join(names())}", param="--acceptance") from None


def _rates(stored: Mapping[str, Any]) -> tuple[float, ...]:
    if "positions" in stored:
        return rates_of_positions(stored["positions"])
    lengths = stored["lengths"].values()
    return (rate_of_length(sum(lengths) / len(lengths), stored["draft_tokens"]),)
