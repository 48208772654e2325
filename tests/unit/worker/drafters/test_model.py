"""Laws of a draft model: its vocabulary may have another padding than the target's, as in the production pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tests.models import VOCAB, packed, tiny
from tests.unit.worker.engine.harness import decode, engine, options, outputs, plain_texts, sequences
from worker.drafters import kv_tracker
from worker.drafters.mixed import MixedDrafter
from worker.drafters.model import ModelDrafter, SharedVocabulary
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import IntArray, Segment
from worker.engine.speculation.draft_tree import Candidates, Forest

DEFINED = 50  # ids of the tokenizer; the models have more, each its own number


def padded(vocab: int, seed: int, defined: int | None) -> PackedModel:
    model = tiny("qwen2", seed=seed, vocab=vocab)
    model.set_attn_implementation(ATTENTION_NAME)
    fuse_layers(model)
    return PackedModel(model, slots=4, capacity=512, defined_ids=defined)


@pytest.mark.parametrize(("of_target", "of_draft"), [(64, 56), (56, 64), (50, 64)])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.2)])
def test_padding_of_either_vocabulary_is_never_drafted_fed_or_emitted(
    of_target: int, of_draft: int, sampling: Sampling
) -> None:
    plain, drafted = sequences(sampling=sampling), sequences(sampling=sampling)
    decode(engine(padded(of_target, 0, DEFINED), None, options(Mode.PLAIN)), plain)
    drafter = ModelDrafter(padded(of_draft, 1, None), "draft", DEFINED)
    results = decode(
        engine(padded(of_target, 0, DEFINED), drafter, options(Mode.PAPER, threshold=0.0, max_depth=3)), drafted
    )
    assert outputs(drafted) == outputs(plain)
    assert max(max(ids) for ids in outputs(drafted)) < DEFINED
    assert sum(r.stats.tree_nodes for r in results) > 0


@pytest.mark.parametrize("known", [VOCAB, 40])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.2)])
def test_only_shared_ids_are_drafted_and_others_change_no_text(known: int, sampling: Sampling) -> None:
    shared = np.array([i for i in range(known) if i % 3], np.int64)
    drafted = sequences(sampling=sampling)
    same = packed(tiny(vocab=known) if known < VOCAB else tiny(), capacity=1024)
    drafter = Watched(ModelDrafter(same, "draft", VOCAB, shared=SharedVocabulary(shared, known)))
    decode(engine(packed(tiny()), drafter, options(Mode.PAPER, threshold=0.0)), drafted)
    assert outputs(drafted) == plain_texts(sampling=sampling)
    assert drafter.offered
    assert drafter.offered <= set(shared.tolist())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("positions", [1, 12, 20])
def test_a_draft_stops_at_its_context_and_the_target_continues(mixed: bool, positions: int) -> None:
    torch.manual_seed(0)
    short = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=1, n_head=2, n_positions=positions))
    short.set_attn_implementation(ATTENTION_NAME)
    short.train(False)
    drafted = sequences(max_tokens=12)
    network = ModelDrafter(PackedModel(short, slots=4, capacity=1024), "short", VOCAB, positions=positions)
    drafter = MixedDrafter(network, SuffixDrafter()) if mixed else network
    decode(engine(packed(tiny()), drafter, options(Mode.PAPER, threshold=0.0, max_depth=3)), drafted)
    assert outputs(drafted) == plain_texts(max_tokens=12)
    assert max(len(text.ids) for text in drafted) > positions


class Watched:
    """A drafter that records its candidates."""

    forward_free = None

    def __init__(self, drafter: ModelDrafter) -> None:
        self.name = drafter.name
        self.num_uncached_tokens, self.commit, self.drop = drafter.num_uncached_tokens, drafter.commit, drafter.drop
        self.drafter = drafter
        self.offered: set[int] = set()

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        found = self.drafter.expand(forest, frontier)
        self.offered |= set(found.tokens[found.probabilities > 0].tolist())
        return found


class Counted:
    """A draft model that counts the rows of chains it runs."""

    def __init__(self, model: PackedModel) -> None:
        self.model = model
        self.compact, self.copy_prefix, self.truncate, self.clear = (
            model.compact,
            model.copy_prefix,
            model.truncate,
            model.clear,
        )
        self.fed = 0

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        self.fed += sum(len(s.ids) for s in segments if s.visible is None)
        return self.model.forward(segments)


@pytest.mark.parametrize(("paged", "together"), [(False, True), (True, False), (True, True)])
def test_a_shared_prefix_is_fed_once_and_changes_no_draft(paged: bool, together: bool) -> None:
    system = [2 + i % 37 for i in range(56)]
    prompts = [[*system, 3, 4], [*system, 3, 4], [*system[:32], 5, 6], [9, 8, 7]]
    runs = []
    for limit in (10_000, 16):  # min length of a prefix that is shared
        draft = tiny("llama", seed=0, num_hidden_layers=1)
        draft.set_attn_implementation(ATTENTION_NAME)
        counted = Counted(PackedModel(draft, slots=4, capacity=160, cpu_kernels=False, paged=paged))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_tracker, "_MIN_SHARED_PREFIX", limit)
            some = sequences(prompts, max_tokens=5, sampling=Sampling(temperature=0.7))
            target = padded(VOCAB, 0, None)
            chosen = options(Mode.PAPER, max_sequences=4 if together else 2, prefill_rows=64, max_depth=3)
            results = decode(engine(target, ModelDrafter(counted, "same", VOCAB), chosen), some)
        runs.append((outputs(some), [r.stats.tree_nodes for r in results], counted.fed))
    (texts, trees, apart), (shared_texts, shared_trees, once) = runs
    assert shared_texts == texts
    assert shared_trees == trees
    assert any(trees)
    saved = 56 + 32 if together else 56  # with two slots, the third arrives after the first two have ended
    assert apart - once >= saved
