"""The grammars of an engine's sequences. Between steps, threads compute what each allows next and what it forces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.engine.errors import GrammarsRefused
from worker.engine.grammar.constraint import Constraint, Stretch
from worker.engine.grammar.vocabulary import GrammarVocabulary, num_threads

if TYPE_CHECKING:
    from worker.engine.sequence import Sequence

Stretches = Future[list[Stretch]]
Walk = tuple[Constraint, list[int], int]  # a path below the newest token, and how many forced tokens may follow it
_Step = tuple[Constraint, list[int], int]  # the next output tokens, and how many forced ones may follow them


@dataclass(slots=True, eq=False)
class _Held:
    """A sequence's grammar, and what it allows at its newest token."""

    constraint: Constraint
    committed: int  # ids that the constraint has taken, prompt included
    future: Stretches | None = None
    index: int = 0  # in the result of the future


class Constraints:
    """The constraint of every sequence with a grammar."""

    def __init__(self, vocabulary: GrammarVocabulary | None, max_forced: int) -> None:
        """Compute up to `max_forced` forced tokens at once. Without a vocabulary no grammar is decoded."""
        self._vocabulary = vocabulary
        self.max_forced = max_forced
        self._held: dict[Sequence, _Held] = {}

    def add(self, sequence: Sequence) -> None:
        """Hold the grammar of a sequence, if it has one. Raises GrammarsRefused if this model decodes none.

        The model's end-of-sequence tokens end it even if the request ignores them: nothing can follow a complete text.
        """
        if sequence.grammar is None:
            return
        refusal = "the engine has no vocabulary" if self._vocabulary is None else self._vocabulary.refusal()
        if self._vocabulary is None or refusal:
            raise GrammarsRefused(f"the model decodes no grammars: {refusal}")
        sequence.eos_ids |= self._vocabulary.eos_ids
        constraint = Constraint(sequence.grammar, self._vocabulary, sequence.eos_ids, sequence.number)
        self._held[sequence] = _Held(constraint, sequence.num_prompt)
        self.prepare([sequence])

    def drop(self, sequences: Iterable[Sequence]) -> None:
        """Forget sequences."""
        for sequence in sequences if self._held else ():
            self._held.pop(sequence, None)

    def prepare(self, sequences: Iterable[Sequence]) -> None:
        """Start to compute what the grammars of these sequences allow after their newest tokens."""
        steps: defaultdict[int, list[tuple[_Held, _Step]]] = defaultdict(list)
        for sequence in sequences if self._held else ():
            held = self._held.get(sequence)
            if held is None:
                continue
            limit = min(self.max_forced, sequence.remaining - 1)
            step = (held.constraint, sequence.ids[held.committed :], limit)
            held.committed = len(sequence.ids)
            steps[sequence.number % num_threads()].append((held, step))
        for number, some in steps.items():
            assert self._vocabulary is not None
            future = self._vocabulary.start(number, _commit, [step for _, step in some])
            for index, (held, _) in enumerate(some):
                held.future, held.index = future, index

    def constraint(self, sequence: Sequence) -> Constraint:
        """Return the constraint of a sequence with a grammar."""
        return self._held[sequence].constraint

    def newest(self, sequence: Sequence) -> Stretch:
        """Return what a grammar allows and forces after the newest token of its sequence; wait for it."""
        held = self._held[sequence]
        assert held.future is not None
        return held.future.result()[held.index]

    def start(self, walks: Seq[tuple[int, Walk]]) -> list[tuple[Stretches, list[int]]]:
        """Start to compute what is allowed after paths, given with the numbers of their sequences.

        Return the results, each with the indices of its paths.
        """
        by_thread: defaultdict[int, list[int]] = defaultdict(list)
        for index, (number, _) in enumerate(walks):
            by_thread[number % num_threads()].append(index)
        started = []
        for number, indices in by_thread.items():
            assert self._vocabulary is not None
            started.append((self._vocabulary.start(number, _walk, [walks[index][1] for index in indices]), indices))
        return started


def _commit(steps: list[_Step]) -> list[Stretch]:
    found = []
    for constraint, tokens, limit in steps:
        constraint.commit(tokens)
        found.append(constraint.stretch(limit=limit))
    return found


def _walk(walks: list[Walk]) -> list[Stretch]:
    return [constraint.stretch(path, limit) for constraint, path, limit in walks]
