"""Longrope by text: rows of both kinds in one forward have the logits and bits that they have alone."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.messages import SamplingParameters
from tests import families
from tests.models import byte_tokenizer
from tests.unit.worker.engine.bits import TEXT
from tests.unit.worker.engine.harness import decode, engine, options, outputs
from worker.bench.interleaved import SlotRange
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.model.architecture import long_text_tokens, max_positions
from worker.engine.model.backend import fuse_layers
from worker.engine.model.loading import load
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import chain
from worker.engine.sequence import Sequence
from worker.text.codec import Codec

ORIGINAL = 32
LONG = [2 + i * 7 % 50 for i in range(60)]


def rope(size: int) -> dict[str, Any]:
    factors = {"short_factor": [1.1] * size, "long_factor": [4.0] * size, "short_mscale": 1.1, "long_mscale": 1.3}
    kind = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": ORIGINAL}
    return kind | factors | {"factor": 8.0}


@cache
def both(kind: str, paged: bool = False) -> tuple[Any, PackedModel]:
    """Return transformers' model, and ours as a worker loads it."""
    own = families.model_of(kind, rope_parameters=rope(8), original_max_position_embeddings=ORIGINAL)
    with TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        model = load(folder, dtype=torch.float32, device=torch.device("cpu"), factors_by_text=True)
    assert long_text_tokens(model.config) == ORIGINAL
    assert max_positions(model.config) == 512
    fuse_layers(model)
    return own, PackedModel(model, slots=4, capacity=160, paged=paged)


def logits_of(own: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = own(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return found


@pytest.mark.parametrize(("kind", "paged"), [("phi3", False), ("phi3", True), ("phimoe", False)])
def test_rows_of_both_kinds_have_the_logits_of_transformers_and_the_bits_that_they_have_alone(
    kind: str, paged: bool
) -> None:
    own, ours = both(kind, paged)
    short, long = chain(0, 0, TEXT[:20], keep_last=True), chain(1, 0, LONG, keep_last=True)
    ours.mark_long(1, True)
    alone = [ours.forward([segment])[0].clone() for segment in (short, long)]
    together = ours.forward([short, long])
    for row, (ids, expected) in enumerate(zip((TEXT[:20], LONG), alone, strict=True)):
        assert torch.equal(together[row], expected)
        assert torch.allclose(together[row], logits_of(own, ids), atol=1e-3)
    pieces = [ours.forward([chain(1, at, LONG[at : at + 20], keep_last=True)]) for at in (0, 20, 40)]
    assert torch.equal(pieces[-1][0], alone[1])
    ours.mark_long(1, False)
    assert not torch.allclose(ours.forward([chain(1, 0, TEXT[:20], keep_last=True)])[0], alone[1])
    assert torch.equal(ours.forward([chain(1, 0, TEXT[:20], keep_last=True)])[0], alone[0])


def test_texts_of_both_kinds_with_one_prefix_share_none_of_it_and_drafts_change_neither() -> None:
    own, ours = both("phi3")

    def texts() -> list[Sequence]:
        prompts = [LONG[:20], LONG[:20], LONG[:20], LONG]
        return [Sequence(i, list(ids), len(ids), 6, Sampling(), long=i % 2 == 1) for i, ids in enumerate(prompts)]

    plain, drafted = texts(), texts()
    for sequence in plain:
        decode(engine(ours, None, options(Mode.PLAIN)), [sequence])
    decode(engine(ours, SuffixDrafter(), options(Mode.PAPER, max_sequences=2)), drafted)
    assert outputs(drafted) == outputs(plain)
    for _ in range(2):  # the second engine's slots start as short ones
        ranged = texts()
        decode(engine(SlotRange(ours, 1, 2), None, options(Mode.PLAIN, max_sequences=2)), ranged)
        assert outputs(ranged) == outputs(plain)
    assert plain[0].output_ids == plain[2].output_ids != plain[1].output_ids
    for sequence in (plain[0], plain[3]):  # below the original positions, and above them from the start
        with torch.no_grad():
            ids = torch.tensor([sequence.ids[: sequence.num_prompt]])
            exact = own.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert sequence.ids == exact[0].tolist()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "long", "room"),
    [(20, 12, False, 12), (20, 13, True, 13), (20, None, False, 12), (31, None, False, 1), (32, None, True, 68)],
)
def test_the_request_alone_says_which_factors_its_text_has(
    prompt: int, max_tokens: int | None, long: bool, room: int
) -> None:
    for context in (100, 90):
        codec = Codec(byte_tokenizer(), frozenset([256]), context, 258, long_text_tokens=ORIGINAL)
        sequence = codec.sequence((0,), TEXT[:prompt], SamplingParameters(max_tokens=max_tokens, seed=0), 0)
        assert sequence.long is long
        assert sequence.max_tokens == (room if room < 60 else context - prompt)
