"""What the engine tests share: sequences, engines, and decoding to the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from tests.models import packed, tiny
from worker.drafters.model import ModelDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.engine import Engine
from worker.engine.model.packed_model import LanguageModel, PackedModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling import parameters
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_tree import Forest
from worker.engine.speculation.drafting import Drafter
from worker.engine.stats import StepBatch, StepResult

OPTIONS = EngineOptions(max_sequences=4, max_context=256, prefill_rows=7, nodes=12, threshold=0.1, max_depth=5)
FLAT_COSTS = CostModel({1: 10.0, 64: 11.0})  # trees are nearly free: they are always worth growing
MAX_TOKENS = 9  # enough to accept paths of three tokens, and to continue a resumed text
PROMPTS = [[2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18], [2, 3, 4, 5, 6, 7]]

noise_key = cache(parameters.noise_key)  # every test has sequences of the same keys


class Unverified:
    """What a drafter does not need while trees only grow."""

    forward_free = None

    def num_uncached_tokens(self, sequence: EngineSequence) -> int:
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        raise AssertionError("nothing is verified here")

    def drop(self, sequence: EngineSequence) -> None:
        raise AssertionError("nothing is verified here")


def options(mode: Mode, **changes: Any) -> EngineOptions:
    """Return test options with a mode and changes."""
    return replace(OPTIONS, mode=mode, **changes)


def all_at_once(mode: Mode, **changes: Any) -> EngineOptions:
    """Return test options that decode all of PROMPTS in one batch: with a slot less it takes twice as many steps."""
    return options(mode, max_sequences=len(PROMPTS), **changes)


def sequences(
    prompts: Sequence[list[int]] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
    sampling: Sampling | None = None,
    eos_ids: Iterable[int] = (),
    seed: int = 7,
) -> list[EngineSequence]:
    """Return one sequence per prompt; sampled ones get a noise key of their own."""
    base = sampling or Sampling()
    return [
        EngineSequence(i, list(p), len(p), max_tokens, replace(base, key=noise_key(seed, i)), frozenset(eos_ids))
        for i, p in enumerate(prompts)
    ]


def greedy_and_sampled(
    sampling: Sampling, prompts: Sequence[list[int]] = PROMPTS, max_tokens: int = MAX_TOKENS
) -> list[EngineSequence]:
    """Return a greedy and a sampled sequence per prompt, for one batch."""
    some = sequences([*prompts, *prompts], max_tokens, sampling)
    for sequence in some[: len(prompts)]:
        sequence.sampling = replace(sequence.sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    return some


@cache
def shared_target(architecture: str = "llama", seed: int = 0, capacity: int = 512) -> PackedModel:
    """Return a tiny model for one engine or drafter at a time: each clears it first, so it is as a new one.

    Making one takes as long as decoding PROMPTS with it.
    """
    return packed(tiny(architecture, seed), slots=2 * len(PROMPTS), capacity=capacity)


def engine(target: LanguageModel, drafter: Drafter | None, chosen: EngineOptions) -> Engine:
    """Return an engine on flat costs."""
    return Engine(target, drafter, chosen, FLAT_COSTS)


def decode(running: Engine, some: Sequence[EngineSequence]) -> list[StepResult]:
    """Run sequences to their end and return every step result."""
    return [result for batch in finish(running, some) for result in batch]


def finish(running: Engine, some: Sequence[EngineSequence]) -> list[StepBatch]:
    """Run sequences to their end and return the results of each step."""
    for sequence in some:
        running.add(sequence)
    batches = []
    while running.busy:
        batches.append(running.step())
    return batches


@cache
def plain_texts(
    architecture: str = "llama", max_tokens: int = MAX_TOKENS, sampling: Sampling | None = None, *, both: bool = False
) -> list[list[int]]:
    """Return the ids that plain decoding emits after each of PROMPTS, or of `greedy_and_sampled` ones."""
    if both and sampling is not None:
        some = greedy_and_sampled(sampling, max_tokens=max_tokens)
    else:
        some = sequences(max_tokens=max_tokens, sampling=sampling)
    decode(
        engine(shared_target(architecture), None, options(Mode.PLAIN, max_sequences=len(some), prefill_rows=64)), some
    )
    return outputs(some)


def resumed_after(count: int, whole: Sequence[list[int]], fresh: Sequence[EngineSequence]) -> Sequence[EngineSequence]:
    """Return fresh sequences that already hold the first tokens of whole outputs, as after a restart."""
    for sequence, done in zip(fresh, whole, strict=True):
        sequence.ids += done[:count]
        sequence.steps = count
    return fresh


def outputs(some: Sequence[EngineSequence]) -> list[list[int]]:
    """Return the emitted ids of each sequence."""
    return [sequence.output_ids for sequence in some]


def drafter(kind: str, seed: int = 0) -> Drafter:
    """Return a drafter by kind: `suffix`, `same` (the target's own weights) or `random` (others)."""
    if kind == "suffix":
        return SuffixDrafter()
    model = shared_target("llama", seed if kind == "same" else seed + 1, capacity=1024)
    return ModelDrafter(model, kind, model.config.vocab_size)
