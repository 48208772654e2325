"""A tiny target with a random draft, and a profile whose probabilities are true."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tests.models import VOCAB, packed, tiny
from worker.bench.acceptance.drafter import PausableClock, ProfileDrafter
from worker.bench.acceptance.pair import RandomPair
from worker.bench.acceptance.profile import AcceptanceProfile, RecordedDepth
from worker.drafters.model import ModelDrafter
from worker.engine.engine import Engine
from worker.engine.host.nodes import FloatArray
from worker.engine.options import EngineOptions, Mode
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftTimes
from worker.engine.speculation.drafting import Drafter

# Two kinds of nodes, equally frequent. Class r has as many samples of a kind as its probability of r says, out of 20.
_SURE, _UNSURE = (0.8, 0.1, 0.05), (0.4, 0.2, 0.1)


def _samples(rank: int) -> FloatArray:
    shares = [(*kind, 1 - sum(kind))[rank] for kind in (_SURE, _UNSURE)]
    return np.repeat([_SURE, _UNSURE], [round(20 * share) for share in shares], axis=0)


_SHAPES = tuple(_samples(rank) for rank in range(4))
RECORDED = RecordedDepth(np.array([len(some) for some in _SHAPES]), _SHAPES, np.array([_UNSURE]))
PROFILE = AcceptanceProfile("tiny", (RECORDED,))

BATCH, TOKENS = 4, 24
OPTIONS = EngineOptions(max_sequences=BATCH, max_context=128, nodes=12, threshold=0.0, max_depth=5)


def tiny_pair() -> RandomPair:
    """Return a target and a draft with other weights, on costs at which trees pay."""
    target = packed(tiny("llama"), slots=2 * BATCH, capacity=OPTIONS.slot_tokens)
    draft = packed(tiny("llama", seed=1), slots=BATCH, capacity=OPTIONS.draft_slot_tokens)
    return RandomPair(
        target=target,
        make_drafter=lambda: ModelDrafter(draft, "random", VOCAB),
        vocabulary=VOCAB,
        options=OPTIONS,
        costs=CostModel({1: 10.0, 64: 11.0}),
        draft_times=DraftTimes({1: 0.01}, {1: 0.01}, 0.001),
        device="cpu",
        dtype="float32",
        max_batch=BATCH,
        memory_note="",
    )


def texts_of(pair: RandomPair, tokens: int) -> list[list[int]]:
    """Return what plain decoding writes."""
    some = pair.sequences(BATCH, tokens)
    _decode(pair.engine(Mode.PLAIN, BATCH, None, None, time.perf_counter), some)
    return [sequence.output_ids for sequence in some]


def decode_by(
    pair: RandomPair,
    profile: AcceptanceProfile,
    texts: Sequence[Sequence[int]],
    nodes: int,
    wrap: Callable[[Drafter], Drafter] = lambda drafter: drafter,
) -> tuple[list[list[int]], IntArray, IntArray]:
    """Decode with trees of `nodes` nodes; return the texts, and accepted tokens and depth of each tree."""
    clock = PausableClock(time.perf_counter)
    drafter = wrap(ProfileDrafter(pair.make_drafter(), profile, texts, clock))
    engine = replace(pair, options=replace(pair.options, nodes=nodes)).engine(Mode.PAPER, BATCH, drafter, None, clock)
    some = pair.sequences(BATCH, len(texts[0]))
    accepted, depths = _decode(engine, some)
    return [sequence.output_ids for sequence in some], accepted, depths


def _decode(engine: Engine, some: list[EngineSequence]) -> tuple[IntArray, IntArray]:
    for sequence in some:
        engine.add(sequence)
    accepted, depths = [], []
    while engine.busy:
        results = engine.step()
        if len(results):
            accepted.append(results.accepted_tokens[results.tree_nodes > 0])
            depths.append(results.tree_depths[results.tree_nodes > 0])
    return np.concatenate(accepted), np.concatenate(depths)
