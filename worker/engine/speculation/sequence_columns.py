"""What does not change while sequences are decoded, as arrays: most steps have the sequences of the step before."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import cached_property

import numpy as np

from worker.engine.host.nodes import END_SHIFT
from worker.engine.sampling.parameters import ParameterArray
from worker.engine.sampling.sampling import parameters_of
from worker.engine.segments import BoolArray, IntArray
from worker.engine.sequence import Sequence


class SequenceColumns:
    """Constant properties of some sequences, one entry for each."""

    def __init__(self, sequences: Seq[Sequence]) -> None:
        """Take the sequences; a column is computed when it is first needed."""
        self.sequences = tuple(sequences)

    @cached_property
    def numbers(self) -> IntArray:
        """Numbers that name the sequences in results [sequences]."""
        return np.array([s.number for s in self.sequences], np.int64)

    @cached_property
    def zeros(self) -> IntArray:
        """Zeros [sequences], which must not be changed."""
        zeros = np.zeros(len(self.sequences), np.int64)
        zeros.setflags(write=False)
        return zeros

    @cached_property
    def max_lengths(self) -> IntArray:
        """Max tokens of prompt and output together [sequences]."""
        return np.array([s.max_length for s in self.sequences], np.int64)

    @cached_property
    def traced_steps(self) -> IntArray:
        """How many of its first steps return their trees [sequences]."""
        return np.array([s.traced_steps for s in self.sequences], np.int64)

    @cached_property
    def parameters(self) -> ParameterArray:
        """Sampling parameters [sequences]."""
        return parameters_of([s.sampling for s in self.sequences])

    @cached_property
    def sampled(self) -> BoolArray:
        """Which sequences are above temperature 0."""
        return np.array([not s.sampling.greedy for s in self.sequences], np.bool_)

    @cached_property
    def argmax(self) -> BoolArray:
        """Which sequences draw the argmax of the raw logits: no noise, no penalties, no biases."""
        return np.array([s.sampling.greedy and not s.sampling.adjusted for s in self.sequences], np.bool_)

    @cached_property
    def all_argmax(self) -> bool:
        """True if all sequences draw the argmax of the raw logits."""
        return bool(self.argmax.all())

    @cached_property
    def drafted(self) -> BoolArray:
        """Which sequences may have drafts [sequences]."""
        return np.array([s.drafts for s in self.sequences], np.bool_)

    @cached_property
    def all_drafted(self) -> bool:
        """True if all sequences may have drafts."""
        return all(s.drafts for s in self.sequences)

    @cached_property
    def any_traced(self) -> bool:
        """True if some sequence returns the trees of its first steps."""
        return bool(self.traced_steps.any())

    @cached_property
    def constrained(self) -> BoolArray:
        """Which sequences have a grammar [sequences]."""
        return np.array([s.grammar is not None for s in self.sequences], np.bool_)

    @cached_property
    def any_constrained(self) -> bool:
        """True if some sequence has a grammar."""
        return any(s.grammar is not None for s in self.sequences)

    @cached_property
    def with_logprobs(self) -> IntArray:
        """Indices of the sequences that request log-probabilities."""
        return np.flatnonzero([s.sampling.logprobs is not None for s in self.sequences])

    def ends(self, indices: IntArray, tokens: IntArray) -> BoolArray:
        """Return for each token whether it ends the sequence at its index."""
        groups, keys = self.end_keys
        if not len(keys):
            return np.zeros(len(tokens), np.bool_)
        wanted = groups[indices] << END_SHIFT | tokens
        found: BoolArray = keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted
        return found

    @cached_property
    def end_keys(self) -> tuple[IntArray, IntArray]:
        """Group of each sequence, one for all with the same end-of-sequence tokens, and the keys of all groups."""
        groups: dict[frozenset[int], int] = {}
        of_sequence = np.array([groups.setdefault(s.eos_ids, len(groups)) for s in self.sequences], np.int64)
        keys = [group << END_SHIFT | token for eos_ids, group in groups.items() for token in eos_ids]
        return of_sequence, np.sort(np.array(keys, np.int64))
