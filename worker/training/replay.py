"""Teacher-forced replay: count how many draft tokens known texts would accept, without running the target again.

The engine decodes a text whose continuation is known. `ReplayTarget` stands in for the target: it returns the known
tokens and the cached hidden states. Acceptance is therefore counted by the code that serves jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.engine.engine import Engine
from worker.engine.host.nodes import FloatArray
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import IntArray, KvMove, Segment
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.drafting import Drafter
from worker.training.features import Example

_MAX_DEPTH = 8  # layers of a draft tree
_TREE_CAPACITY = 128  # KV entries beyond the text, for the draft tree


@dataclass(frozen=True, slots=True)
class AcceptanceResult:
    """Expected and accepted draft tokens of each step, at one tree size."""

    nodes: int  # draft tree nodes per step
    expected: FloatArray  # [steps] draft tokens, by the values of the tree
    accepted: FloatArray  # [steps] draft tokens

    @property
    def expected_acceptance(self) -> float:
        """Mean accepted draft tokens per step, the realised E(A)."""
        return float(self.accepted.mean())

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per step: accepted draft tokens and one of the target."""
        return 1.0 + self.expected_acceptance

    @property
    def by_depth(self) -> tuple[float, ...]:
        """Share of steps that accepted at least 1, 2, … draft tokens."""
        return tuple(float((self.accepted >= depth).mean()) for depth in range(1, _MAX_DEPTH + 1))

    @property
    def error(self) -> float:
        """Relative error of the mean expected acceptance."""
        return abs(float(self.expected.mean()) - self.expected_acceptance) / max(self.expected_acceptance, 1e-9)


class ReplayTarget:
    """A LanguageModel that returns the tokens and hidden states of one example, in slot 0."""

    def __init__(self, examples: Sequence[Example], vocabulary: int, device: torch.device) -> None:
        """Allocate hidden states for the longest example and a draft tree."""
        capacity = max(len(example.ids) for example in examples) + _TREE_CAPACITY
        first = examples[0].hidden
        self.hidden = HiddenStates(1, capacity, first.shape[1], first.dtype, device)
        self._vocabulary = vocabulary
        self._device = device
        self._example = examples[0]

    def set_example(self, example: Example) -> None:
        """Return this example from the next forward on."""
        self._example = example

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Return one-hot logits of the text's next token at the position of each kept row."""
        (segment,) = segments
        last = len(self._example.ids) - 1
        positions = torch.from_numpy(np.minimum(segment.positions, last))
        self.hidden.write(segments, self._example.hidden[positions].to(self._device))
        following = self._example.ids[(positions + 1).clamp(max=last)][torch.from_numpy(segment.keep)]
        logits = torch.zeros(len(following), self._vocabulary)
        logits[torch.arange(len(following)), following] = 1.0
        return logits.to(self._device)

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move the hidden states of accepted rows into place."""
        self.hidden.compact(moves)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Do nothing: there is one slot."""

    def truncate(self, slot: int, length: int) -> None:
        """Do nothing: the memory is fixed."""

    def clear(self) -> None:
        """Do nothing: the memory is fixed."""


def replay(
    examples: Sequence[Example],
    replay_target: ReplayTarget,
    make_drafter: Callable[[HiddenStates], Drafter],
    nodes: int,
    *,
    calibrated: bool = False,
) -> AcceptanceResult:
    """Decode the examples with draft trees of the `nodes` most valuable nodes.

    Node values are the draft's probabilities or, if `calibrated`, learned acceptance rates.
    """
    longest = max(len(example.ids) for example in examples)
    options = EngineOptions(
        Mode.PAPER, 1, longest, nodes=nodes, threshold=0.0, max_depth=_MAX_DEPTH, calibrated=calibrated
    )
    engine = Engine(replay_target, make_drafter(replay_target.hidden), options)
    expected: list[FloatArray] = []
    accepted: list[IntArray] = []
    for index, example in enumerate(examples):
        prompt = example.ids[: example.num_prompt].tolist()
        replay_target.set_example(example)
        engine.add(EngineSequence(index, prompt, len(prompt), len(example.ids) - len(prompt), Sampling()))
        while engine.busy:
            results = engine.step()
            decoded = results.steps > 0
            expected.append(results.expected_accepted[decoded])
            accepted.append(results.accepted_tokens[decoded])
    return AcceptanceResult(nodes, np.concatenate(expected), np.concatenate(accepted).astype(np.float64))
