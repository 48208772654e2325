"""Replay: how well a draft foresees texts that it has not learned from, without running the target again.

The engine decodes a known text with the draft; in the target's place stands one who recites it, with the hidden states
that the target had. So acceptance is counted by the very code that serves jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.engine.engine import Engine
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling.sampling import Sampling
from worker.engine.segments import KvMove, Segment
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.draft_tree import FloatArray
from worker.engine.speculation.drafting import Drafter
from worker.engine.stats import StepStats
from worker.training.features import Example

_DEPTH = 8  # layers of a tree at most


@dataclass(frozen=True, slots=True)
class AcceptanceResult:
    """How well a draft foresaw the texts with so many nodes a step."""

    nodes: int
    expected: FloatArray  # [steps] draft tokens that the tree's values promised
    accepted: FloatArray  # [steps] draft tokens accepted

    @property
    def expected_acceptance(self) -> float:
        """E(A) as it turned out: draft tokens accepted a step."""
        return float(self.accepted.mean())

    @property
    def tokens_per_step(self) -> float:
        """Accepted draft tokens and the target's own."""
        return 1.0 + self.expected_acceptance

    @property
    def by_depth(self) -> tuple[float, ...]:
        """Share of the steps that accepted at least so deep, from depth 1 on."""
        return tuple(float((self.accepted >= depth).mean()) for depth in range(1, _DEPTH + 1))

    @property
    def error(self) -> float:
        """By how much promises were off, relative to what was accepted."""
        return abs(float(self.expected.mean()) - self.expected_acceptance) / max(self.expected_acceptance, 1e-9)


class ReplayTarget:
    """A target that says what a example says, in slot 0."""

    def __init__(self, lessons: Sequence[Example], vocabulary: int, device: torch.device) -> None:
        """Make room for the longest of the lessons and a tree."""
        capacity = max(len(example.ids) for example in lessons) + 128
        first = lessons[0].hidden
        self.hidden = HiddenStates(1, capacity, first.shape[1], first.dtype, device)
        self._vocabulary = vocabulary
        self._device = device
        self._example = lessons[0]

    def set_example(self, example: Example) -> None:
        """From now on say this."""
        self._example = example

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Return one-hot logits of the next token of the text at each kept row's position."""
        (segment,) = segments
        last = len(self._example.ids) - 1
        places = torch.from_numpy(np.minimum(segment.positions, last))
        self.hidden.write(segments, self._example.hidden[places].to(self._device))
        following = self._example.ids[(places + 1).clamp(max=last)][torch.from_numpy(segment.keep)]
        logits = torch.zeros(len(following), self._vocabulary)
        logits[torch.arange(len(following)), following] = 1.0
        return logits.to(self._device)

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Bring the states of accepted rows down."""
        self.hidden.compact(moves)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """There is one slot."""

    def truncate(self, slot: int, length: int) -> None:
        """Its memory stays."""

    def clear(self) -> None:
        """Its memory stays."""


def replay(
    lessons: Sequence[Example],
    replay_target: ReplayTarget,
    make_drafter: Callable[[HiddenStates], Drafter],
    nodes: int,
    *,
    calibrated: bool = False,
) -> AcceptanceResult:
    """Decode the lessons with the `nodes` best nodes a step; `calibrated` values them by learned acceptance."""
    longest = max(len(example.ids) for example in lessons)
    options = EngineOptions(Mode.PAPER, 1, longest, nodes=nodes, threshold=0.0, max_depth=_DEPTH, calibrated=calibrated)
    engine = Engine(replay_target, make_drafter(replay_target.hidden), options)
    stats: list[StepStats] = []
    for number, example in enumerate(lessons):
        prompt = example.ids[: example.num_prompt].tolist()
        replay_target.set_example(example)
        engine.add(EngineSequence(number, prompt, len(prompt), len(example.ids) - len(prompt), Sampling()))
        while engine.busy:
            stats += [result.stats for result in engine.step() if result.stats.step]
    return AcceptanceResult(
        nodes=nodes,
        expected=np.array([n.expected_accepted for n in stats]),
        accepted=np.array([n.accepted_tokens for n in stats], np.float64),
    )
