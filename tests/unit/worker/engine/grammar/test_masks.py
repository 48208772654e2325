"""Each path of a draft tree has a mask, forced tokens cost no draft, and a grammar that fails ends one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace
from tokenizers.decoders import Sequence as Decoders
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from tests.models import JSON_VOCAB, byte_tokenizer, json_tokenizer
from tests.unit.worker.engine.grammar.grammars import (
    CODES,
    EOS,
    LOOSE,
    OBJECT,
    WIDTH,
    bound_by,
    constrained_engine,
    target,
    vocabulary,
)
from tests.unit.worker.engine.harness import FLAT_COSTS, decode, options, outputs
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.engine import Engine
from worker.engine.errors import GrammarsRefused
from worker.engine.grammar.constraint import Allowed, Constraint
from worker.engine.grammar.constraints import Constraints
from worker.engine.grammar.grammar import Grammar
from worker.engine.grammar.vocabulary import GrammarVocabulary
from worker.engine.options import Mode
from worker.engine.sequence import Sequence
from worker.engine.speculation.decision import Decision
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.sequence_columns import SequenceColumns
from worker.engine.speculation.tree_masks import TreeMasks
from worker.engine.stats import StepResult
from worker.serving.resilient_engine import ResilientEngine
from worker.text.grammar_tokenizer import grammar_tokenizer

GRAMMARS = (OBJECT, LOOSE, CODES)


def fresh(grammar: Grammar, output: list[int]) -> set[int]:
    """Return the tokens that a matcher allows which has read nothing but `output`."""
    matcher = LLMatcher(vocabulary().tokenizer, grammar.text)
    assert matcher.consume_tokens(output)
    return ids_of(vocabulary().fill(matcher))


def ids_of(mask: np.ndarray[Any, np.dtype[np.int32]]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def random_forest(rng: np.random.Generator, constraints: Constraints, some: list[Sequence]) -> Forest:
    """Grow trees of permitted tokens at random, with what is forced."""
    columns = SequenceColumns(some)
    forest = Forest(columns, masks=TreeMasks(columns, constraints))
    assert forest.masks is not None
    frontier, ends = forest.force(forest.roots)
    for _ in range(3):
        frontier = np.concatenate([frontier, ends])
        offered = Candidates(rng.integers(0, WIDTH, (len(frontier), 40)), np.full((len(frontier), 40), 0.5))
        kept = forest.masks.permitted(frontier, offered)
        kept.probabilities[rng.random(kept.probabilities.shape) < 0.7] = 0.0
        added = forest.add_layer(frontier, kept)
        added = added[~columns.ends(forest.tree[added], forest.token[added])]
        frontier, ends = forest.force(rng.permutation(added)[:6])
    return forest


@pytest.mark.parametrize("seed", range(3))
def test_the_mask_of_every_node_is_that_of_a_fresh_matcher_that_reads_its_path(seed: int) -> None:
    rng = np.random.default_rng(seed)
    some = bound_by([*GRAMMARS, None])
    decode(constrained_engine(Mode.PLAIN), some)
    for sequence in some:
        sequence.finish_reason = None
        del sequence.ids[sequence.num_prompt + int(rng.integers(0, len(sequence.output_ids))) :]
    constraints = Constraints(vocabulary(), 12)
    for sequence in some:
        constraints.add(sequence)
    forest = random_forest(rng, constraints, some)
    kept = np.ones(forest.size, np.bool_)
    kept[len(some) :] = rng.random(forest.size - len(some)) < 0.9
    for node in range(len(some), forest.size):
        kept[node] &= kept[forest.parent[node]]
    selected = forest.pruned(kept)
    assert selected.masks is not None
    selected.masks.start(selected)
    selected.masks.finish()
    nodes = np.arange(selected.size)
    bound, masks = selected.masks.masks(nodes)
    found = dict(zip(bound.tolist(), masks, strict=True))
    compared = 0
    for node in nodes.tolist():
        sequence = some[selected.tree[node]]
        if sequence.grammar is None or (node >= len(some) and selected.token[node] == EOS):
            assert node not in found
            continue
        allowed = fresh(sequence.grammar, [*sequence.output_ids, *selected.path(node)])
        assert ids_of(found[node]) == allowed
        parent = selected.parent[node]
        if node >= len(some) and selected.forced[node]:
            assert ids_of(found[parent]) == {selected.token[node]}, "a forced token has no alternative"
            compared += 1
    assert compared or seed, "nothing was forced"


def test_ids_without_a_token_are_never_allowed() -> None:
    anything = Grammar(LLMatcher.grammar_from_regex(r"(?s:.*)"))
    assert max(fresh(anything, [])) < JSON_VOCAB < WIDTH
    named = Grammar('start: <[310]> "a"')
    constraint = Constraint(named, vocabulary(), frozenset([EOS]), 0)
    assert constraint.allowed().failure, "the model has no token 310"


def test_what_is_forbidden_gives_its_probability_to_the_rest() -> None:
    some = bound_by([CODES, None])
    constraints = Constraints(vocabulary(), 0)
    constraints.add(some[0])
    columns = SequenceColumns(some)
    masks = TreeMasks(columns, constraints)
    masks.finish()
    a, x = (json_tokenizer().get_vocab()[letter] for letter in "ax")
    offered = Candidates(np.array([[a, x], [a, x]]), np.array([[0.3, 0.5], [0.3, 0.5]]))
    permitted = masks.permitted(np.arange(2), offered)
    assert permitted.probabilities.tolist() == [[0.6, 0.0], [0.3, 0.5]]


class Counting(SuffixDrafter):
    """Counts the nodes that it is asked about."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[list[int], int]] = []  # (sequence's ids and path, its number)

    def expand(self, forest: Forest, frontier: np.ndarray[Any, np.dtype[np.int64]]) -> Candidates:
        for node in frontier.tolist():
            sequence = forest.sequences[forest.tree[node]]
            self.asked.append(([*sequence.output_ids, *forest.path(node)], sequence.number))
        return super().expand(forest, frontier)


@pytest.mark.parametrize("mode", [Mode.PAPER, Mode.OPT_TREE])
def test_a_drafter_is_not_asked_where_the_grammar_forces_a_token(mode: Mode) -> None:
    drafter = Counting()
    some = bound_by([OBJECT, CODES, OBJECT])
    decode(Engine(target(), drafter, options(mode), FLAT_COSTS, vocabulary=vocabulary()), some)
    grammars = {sequence.number: sequence.grammar for sequence in some}
    assert drafter.asked
    for output, number in drafter.asked:
        grammar = grammars[number]
        assert grammar is not None
        assert len(fresh(grammar, output)) > 1


def totals(results: list[StepResult]) -> dict[str | None, int]:
    """Return accepted tokens by source."""
    found: dict[str | None, int] = {}
    for result in results:
        found[result.stats.drafter] = found.get(result.stats.drafter, 0) + result.stats.accepted_tokens
    return found


class Silent(SuffixDrafter):
    """Offers nothing."""

    def expand(self, forest: Forest, frontier: np.ndarray[Any, np.dtype[np.int64]]) -> Candidates:
        return Candidates(np.zeros((len(frontier), 1), np.int64), np.zeros((len(frontier), 1)))


def test_forced_tokens_are_verified_without_a_draft_and_teach_nothing_about_it() -> None:
    some = bound_by([OBJECT] * 4)
    running = Engine(target(), Silent(), options(Mode.OPT_TREE, probe_every=1000), FLAT_COSTS, vocabulary=vocabulary())
    before = running.learned["acceptance"]
    results = decode(running, some)
    assert running.learned["acceptance"] == before
    assert set(totals(results)) == {None, "grammar"}
    accepted = totals(results)["grammar"]
    assert accepted > len(some) * 10, "most of the answer is forced"
    forced = [r.stats for r in results if r.stats.drafter == "grammar"]
    assert all(stats.accepted_tokens == stats.tree_nodes == stats.expected_accepted for stats in forced)
    assert all(not stats.reached for stats in forced), "a forced token has no rank among drafts"
    assert {r.stats.decision for r in results} >= {Decision.GRAMMAR}


def test_a_blocked_draft_leaves_the_forced_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.speculation.regret_guard.RegretGuard.blocked", lambda *_: True)
    results = decode(constrained_engine(Mode.OPT_TREE), bound_by([OBJECT] * 2))
    assert totals(results)["grammar"] > 20
    assert {r.stats.decision for r in results} == {Decision.PREFILL, Decision.PROBE, Decision.GUARD, Decision.GRAMMAR}


def test_a_grammar_whose_masks_take_long_gets_no_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9))
    monkeypatch.setattr("worker.engine.grammar.constraint.thread_time", lambda: float(next(clock)))
    some = bound_by([OBJECT, None], 8)
    results = decode(constrained_engine(Mode.PAPER, "same"), some)
    nodes = {some[0].number: 0, some[1].number: 0}
    for result in results:
        nodes[result.number] += result.stats.tree_nodes
    assert nodes[some[0].number] == 0
    assert nodes[some[1].number] > 0


def test_plain_steps_verify_no_forced_tokens() -> None:
    assert all(r.stats.tree_nodes == 0 for r in decode(constrained_engine(Mode.PLAIN), bound_by([OBJECT] * 2)))


def test_without_a_grammar_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("called")

    for name in ("GrammarVocabulary.refusal", "GrammarVocabulary.start", "GrammarVocabulary.fill"):
        monkeypatch.setattr(f"worker.engine.grammar.vocabulary.{name}", refuse)
    monkeypatch.setattr("worker.engine.speculation.planner.TreeMasks", refuse)
    decode(constrained_engine(Mode.OPT_TREE), bound_by([None] * 2, 6))


def broken_after(count: int) -> Callable[..., Any]:
    """Return a `Constraint.allowed` that fails after a number of output tokens."""
    allowed = Constraint.allowed

    def failing(self: Any, path: Any = ()) -> Allowed:
        if len(self._bound) + len(path) >= count:
            return Allowed(np.zeros(WIDTH // 32, np.int32), "too complex")
        return allowed(self, path)

    return failing


@pytest.fixture
def expected() -> list[list[int]]:
    """What sequences emit that no failure concerns."""
    some = bound_by([OBJECT, CODES, None, LOOSE], 20)
    decode(constrained_engine(Mode.PLAIN), some)
    return outputs(some)


def decoded(running: ResilientEngine, some: list[Sequence]) -> Iterator[Sequence]:
    """Decode with an engine that survives failures; yield what it gives up."""
    for sequence in some:
        running.add(sequence)
    while running.busy:
        yield from running.step()[1]


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.OPT_TREE])
def test_a_grammar_that_can_not_go_on_ends_its_sequence_alone(mode: Mode, expected: list[list[int]]) -> None:
    dead_ends = [
        (Grammar('start: "a" <[310]>'), "allows no token of the model"),  # a token that the model has not
        (Grammar("start: nothing"), "is refused"),
        (Grammar(r"start: /(?=a)b/"), "is refused"),
        (Grammar("{}"), "is refused"),
    ]
    some = bound_by([OBJECT, CODES, None, LOOSE, *(grammar for grammar, _ in dead_ends)], 20)
    built: list[Engine] = []

    def build() -> Engine:
        built.append(constrained_engine(mode))
        return built[-1]

    given_up = list(decoded(ResilientEngine(build), some))
    assert {s.number for s in given_up} == {s.number for s in some[4:]}
    for sequence, (_, reason) in zip(some[4:], dead_ends, strict=True):
        assert reason in sequence.failure
        assert "\n" not in sequence.failure
    assert outputs(some[:4]) == expected
    assert len(built) == 1, "the engine must not be rebuilt: its neighbours would be read again"


@pytest.mark.parametrize("kind", ["suffix", "same"])
def test_a_failure_ends_a_sequence_where_plain_decoding_would(
    kind: str, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Constraint, "allowed", broken_after(9))
    some = bound_by([OBJECT, CODES, None, LOOSE], 20)
    running = constrained_engine(Mode.PAPER, kind)
    decode(running, some)
    for index, sequence in enumerate(some):
        if index == 2 or len(expected[index]) <= 9:
            assert sequence.output_ids == expected[index]
            assert not sequence.failure
        else:
            assert sequence.output_ids == expected[index][:9]
            assert sequence.failure == "too complex"


def test_an_error_is_believed_of_a_new_matcher_only() -> None:
    constraint = Constraint(CODES, vocabulary(), frozenset([EOS]), 0)
    before = constraint.allowed()
    assert constraint._matcher is not None
    constraint._matcher.consume_token(EOS)  # not allowed: the matcher is in its error state
    assert constraint._matcher.is_error()
    after = constraint.allowed()
    assert before.mask is not None
    assert after.mask is not None
    assert (after.mask == before.mask).all()


@pytest.mark.parametrize(
    "grammar",
    [
        LOOSE,
        Grammar("start: /[a-z]{0,3}/ <[270-272]> /[a-z]{0,3}/ <[5]>"),  # tokens by number
        Grammar('start: part "x"\npart[stop="q"]: /[a-p]*/'),  # a matcher that can't walk back is compiled again
    ],
    ids=["schema", "tokens", "stop"],
)
def test_a_matcher_survives_any_walk(grammar: Grammar) -> None:
    rng = np.random.default_rng(0)
    constraint = Constraint(grammar, vocabulary(), frozenset([EOS]), 0)
    paths: list[list[int]] = [[]]
    for _ in range(40):
        path = paths[int(rng.integers(len(paths)))]
        mask = constraint.allowed(path).mask
        assert mask is not None
        assert ids_of(mask) == fresh(grammar, path)
        paths += [[*path, token] for token in rng.permutation(sorted(ids_of(mask) - {EOS}))[:3].tolist()]


def test_a_tokenizer_that_can_not_be_held_exactly_refuses_grammars_by_name() -> None:
    words = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = WordPieceDecoder()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[UNK]")  # type: ignore[no-untyped-call]
    with pytest.raises(GrammarsRefused, match="can't read the tokenizer"):
        grammar_tokenizer(wrapped, [0], 3)
    with pytest.raises(GrammarsRefused, match="no end-of-sequence token"):
        grammar_tokenizer(byte_tokenizer(), [], 258)
    letters = Tokenizer(BPE({"<eos>": 0, "a": 1, "b": 2}, [], byte_fallback=True))
    letters.decoder = Decoders([ByteFallback(), Replace("b", "c"), Fuse()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>")  # type: ignore[no-untyped-call]
    with pytest.raises(GrammarsRefused, match="reads token 2 as 'b', and it writes 'c'"):
        grammar_tokenizer(wrapped, [0], 3)


@pytest.mark.parametrize("known", [True, False])
def test_a_model_without_grammars_refuses_their_sequences_and_decodes_the_others(known: bool) -> None:
    def refuse() -> Any:
        raise GrammarsRefused("no such tokenizer")

    held = GrammarVocabulary(refuse, frozenset([EOS]), WIDTH, JSON_VOCAB) if known else None
    some = bound_by([OBJECT, None], 5)
    engine = Engine(target(), None, options(Mode.PLAIN), FLAT_COSTS, vocabulary=held)
    assert list(decoded(ResilientEngine(lambda: engine), some)) == some[:1]
    assert not engine.busy
    assert "decodes no grammars" in some[0].failure
    assert len(some[1].output_ids) == 5
