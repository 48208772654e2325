"""A drafter that is right as often as a profile says, and costs what the real one costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from worker.bench.acceptance.profile import AcceptanceProfile
from worker.bench.acceptance.target_path import TargetPath
from worker.engine.host.nodes import FloatArray
from worker.engine.segments import IntArray
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter

_GOLDEN = 0.6180339887498949  # steps by it spread evenly over 0..1


class PausableClock:
    """A clock in seconds that stands still while the benchmark does what a real draft would not."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Read `clock`."""
        self._clock = clock
        self._paused = 0.0

    def __call__(self) -> float:
        """Return the seconds so far."""
        return self._clock() - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what runs inside."""
        started = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - started


class ProfileDrafter:
    """Replaces what a drafter offers by what a profile says; its forwards and its wrong candidates stay.

    On the path of the target the next token is put among the candidates at the rank that the profile draws, or taken
    out of them. Draws depend on seed, sequence and position alone: a position that is easy at one depth is easy at any.
    Each node gets the probabilities of one recorded node, in the order of its candidates.
    """

    def __init__(
        self,
        drafter: Drafter,
        profile: AcceptanceProfile,
        texts: Sequence[Sequence[int]],
        clock: PausableClock,
        seed: int = 0,
    ) -> None:
        """`texts` are what the target writes for the sequences with the keys 0, 1, …"""
        self.name, self.forward_free = f"{drafter.name} at {profile.name}", None
        self.num_uncached_tokens, self.commit, self.drop = drafter.num_uncached_tokens, drafter.commit, drafter.drop
        self._drafter, self._profile, self._clock = drafter, profile, clock
        self._path = TargetPath(texts)
        longest = max(map(len, texts), default=0) + 1
        self._uniform = np.stack([np.random.default_rng((seed, row)).random(longest) for row in range(len(texts))])

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Run the drafter over the frontier; offer its candidates with the target's token where the profile says."""
        offered = self._drafter.expand(forest, frontier)
        with self._clock.paused():
            return self._replaced(forest, frontier, offered)

    def _replaced(self, forest: Forest, frontier: IntArray, offered: Candidates) -> Candidates:
        on, truth = self._path.follow(forest, frontier)
        width = min(offered.tokens.shape[1], self._profile.width)
        depth = int(forest.depth[frontier[0]])
        uniform = self._uniform[self._path.places(forest.tree[frontier], depth)]
        draws = self._profile.at(depth)
        ranks, probabilities = draws.on_path(uniform)
        off = ~on
        if off.any():
            spread = (uniform[off] + forest.token[frontier[off]] * _GOLDEN) % 1.0
            probabilities[off] = draws.off(spread)
        hit = on & (truth >= 0) & (ranks < width)
        tokens, probabilities = _placed(offered.tokens, probabilities[:, :width], truth, np.where(hit, ranks, width))
        # A node for which the drafter had no memory or no context gets no candidates.
        return Candidates(tokens, probabilities * offered.probabilities.any(axis=1, keepdims=True))


def _placed(own: IntArray, probabilities: FloatArray, truth: IntArray, ranks: IntArray) -> tuple[IntArray, FloatArray]:
    """Return candidates [n, k] with `truth` [n] at `ranks` [n], or without it where the rank is k.

    `own` are [n, k or more]. Other candidates keep their order. If one is missing then, the last entry is empty.
    """
    width = probabilities.shape[1]
    columns = np.arange(own.shape[1])
    found = own == truth[:, None]
    others = np.take_along_axis(own, np.argsort(np.where(found, len(columns), columns), axis=1, kind="stable"), axis=1)
    here, rank = np.arange(width), ranks[:, None]
    tokens = np.take_along_axis(others, here - (here > rank), axis=1)
    tokens = np.where(here == rank, truth[:, None], tokens)
    if own.shape[1] == width:
        probabilities[found.any(axis=1) & (ranks == width), -1] = 0.0
    return tokens, probabilities
