"""Laws of a sequence: what the request process sends is what the engine gets."""

from __future__ import annotations

import pickle
from dataclasses import fields

import numpy as np

from worker.engine.grammar.grammar import Grammar
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sequence import Sequence


def resumed() -> Sequence:
    sampling = Sampling(0.7, 5, 0.9, 0.1, noise_key(3, 1), 0.5, logit_bias=((3, 1.5), (9, -2.0)), logprobs=2)
    grammar = Grammar("start: /a+/", after=(4,))
    return Sequence(
        ("job", 7, 1), [5, 70_000, 5, 8], 3, 40, sampling, frozenset({2}), grammar, group="job", traced_steps=3
    )


def test_a_sequence_that_was_sent_is_the_same() -> None:
    for sequence in (resumed(), Sequence(0, [], 0, 1, Sampling())):
        got = pickle.loads(pickle.dumps(sequence))
        differing = {
            field.name
            for field in fields(Sequence)
            if field.name != "history" and getattr(got, field.name) != getattr(sequence, field.name)
        }
        assert differing == set()
        assert got.sampling.record.tobytes() == sequence.sampling.record.tobytes()
        for array, sent in zip(got.sampling.bias, sequence.sampling.bias, strict=True):
            np.testing.assert_array_equal(array, sent, strict=True)


def test_packed_ids_follow_those_that_are_appended_and_cut() -> None:
    sequence = resumed()
    assert sequence.packed_ids(3).tolist()[:3] == [5, 70_000, 5]
    sequence.ids += [1, 2]
    assert sequence.packed_ids(6).tolist() == sequence.ids
    sequence.cut(4)
    sequence.ids += [6, 7]
    assert sequence.packed_ids(6).tolist() == [5, 70_000, 5, 8, 6, 7]
