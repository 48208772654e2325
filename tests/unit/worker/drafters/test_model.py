"""Laws of a draft model: it may pad its vocabulary otherwise than the target, as the production pair does."""

from __future__ import annotations

import pytest

from tests.models import tiny
from tests.unit.worker.engine.harness import decode, engine, options, outputs, sequences
from worker.drafters.model import ModelDrafter
from worker.engine.attention import ATTENTION_NAME
from worker.engine.language_model import PackedModel
from worker.engine.options import Mode
from worker.engine.sampling import Sampling

DEFINED = 50  # ids of the tokenizer; the models have more, each its own number


def padded(vocab: int, seed: int, defined: int | None) -> PackedModel:
    model = tiny("qwen2", seed=seed, vocab=vocab)
    model.set_attn_implementation(ATTENTION_NAME)
    return PackedModel(model, slots=4, capacity=1024, defined_ids=defined)


@pytest.mark.parametrize(("of_target", "of_draft"), [(64, 56), (56, 64), (50, 64)])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.2)])
def test_padding_of_either_vocabulary_is_never_drafted_fed_or_emitted(
    of_target: int, of_draft: int, sampling: Sampling
) -> None:
    plain, drafted = sequences(sampling=sampling), sequences(sampling=sampling)
    decode(engine(padded(of_target, 0, DEFINED), None, options(Mode.PLAIN)), plain)
    drafter = ModelDrafter(padded(of_draft, 1, None), "draft", DEFINED)
    results = decode(engine(padded(of_target, 0, DEFINED), drafter, options(Mode.PAPER, threshold=0.0)), drafted)
    assert outputs(drafted) == outputs(plain)
    assert max(max(ids) for ids in outputs(drafted)) < DEFINED
    assert sum(r.numbers.tree_nodes for r in results) > 0
