"""Grammars, a vocabulary and sequences that the grammar laws share."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache
from typing import Any

from llguidance import LLMatcher

from tests.models import JSON_VOCAB, json_tokenizer, packed, tiny
from tests.unit.worker.engine.harness import FLAT_COSTS, PROMPTS, drafter, options
from worker.drafters.model import ModelDrafter
from worker.engine.engine import Engine
from worker.engine.grammar.grammar import Grammar
from worker.engine.grammar.vocabulary import GrammarVocabulary
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sequence import Sequence
from worker.engine.speculation.drafting import Drafter
from worker.text.grammar_tokenizer import grammar_tokenizer

WIDTH = 320  # of the logits: some ids have no token
EOS = 0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "kind": {"enum": ["alpha", "beta gamma"]},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "kind", "ok"],
    "additionalProperties": False,
}
OBJECT = Grammar(
    LLMatcher.grammar_from_json_schema(
        SCHEMA, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    )
)
LOOSE = Grammar(LLMatcher.grammar_from_json_schema(SCHEMA))  # any whitespace: little is forced
CODES = Grammar(LLMatcher.grammar_from_regex(r"(ab|cd|é){2,6}-[0-9]{3}"))
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=30, repetition_penalty=1.3, frequency_penalty=0.4),
    Sampling(presence_penalty=0.5, logit_bias=((5, 8.0), (90, -4.0))),
)


@cache
def vocabulary() -> GrammarVocabulary:
    """The vocabulary of `json_tokenizer`, for logits of WIDTH tokens."""
    return GrammarVocabulary(
        lambda: grammar_tokenizer(json_tokenizer(), [EOS], WIDTH), frozenset([EOS]), WIDTH, JSON_VOCAB
    )


@cache
def target(seed: int = 0, capacity: int = 512) -> PackedModel:
    """A tiny model with the vocabulary, for one engine or drafter at a time, which clears it."""
    return packed(tiny(seed=seed, vocab=WIDTH), capacity=capacity)


def bound_by(
    grammars: Seq[Grammar | None], max_tokens: int = 28, samplings: Seq[Sampling] = SAMPLINGS
) -> list[Sequence]:
    """Return a sequence for each grammar; prompts and samplings take turns."""
    some = []
    for index, grammar in enumerate(grammars):
        prompt = PROMPTS[index % len(PROMPTS)]
        sampling = replace(samplings[index % len(samplings)], key=noise_key(7, index))
        some.append(Sequence(index, list(prompt), len(prompt), max_tokens, sampling, frozenset([EOS]), grammar))
    return some


def constrained_engine(mode: Mode, kind: str = "suffix", model: PackedModel | None = None, **changes: Any) -> Engine:
    """Return an engine that knows the vocabulary, with a drafter by kind."""
    drafts: Drafter | None = None
    if mode is not Mode.PLAIN:
        network = target(seed=0 if kind == "same" else 1, capacity=1024)
        drafts = drafter("suffix") if kind == "suffix" else ModelDrafter(network, kind, WIDTH)
    return Engine(model or target(), drafts, options(mode, **changes), FLAT_COSTS, vocabulary=vocabulary())
