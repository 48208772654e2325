"""Laws of the prefix tree: the longest common prefix to the token, as a comparison with every text would find it."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.kv.prefix_tree import PrefixTree, common_prefix_length
from worker.engine.segments import TokenIds

TEXTS = st.lists(st.integers(0, 1), max_size=8).map(lambda ids: array("i", ids))
ACTIONS = st.tuples(
    st.sampled_from(["insert", "join", "copy", "shrink", "remove"]), st.integers(0, 3), st.integers(0, 3), TEXTS
)


@settings(deadline=None, max_examples=150)
@given(st.lists(ACTIONS, max_size=20), TEXTS)
def test_a_lookup_finds_what_a_comparison_with_every_text_finds(
    actions: list[tuple[str, int, int, TokenIds]], wanted: TokenIds
) -> None:
    tree: PrefixTree[int] = PrefixTree()
    held: dict[int, TokenIds] = {}
    for action, holder, other, ids in actions:
        if action == "insert":
            held[holder] = held.get(holder, array("i")) + ids
            tree.insert(holder, held[holder], len(held[holder]))
        elif action == "join" and ids and not held.get(holder):
            limit = min(other, len(ids))
            before = tree.longest(ids, limit)
            first, length = tree.join(holder, ids, len(ids), limit)
            assert length == before.length
            assert first == next(iter(before.holders), None) or not length
            held[holder] = ids
        elif action == "remove":
            held.pop(holder, None)
            tree.remove(holder)
        elif action == "shrink" and held.get(holder):
            held[holder] = held[holder][: max(1, len(ids))]
            tree.shrink(holder, max(1, len(ids)))
        elif action == "copy" and held.get(other) and not held.get(holder):
            held[holder] = held[other][: max(1, len(ids))]
            tree.copy(other, holder, len(held[holder]))
        lengths = {one: common_prefix_length(text, wanted) for one, text in held.items()}
        longest = max(lengths.values(), default=0)
        match = tree.longest(wanted, len(wanted))
        assert match.length == longest
        if longest:
            assert set(match.holders) == {one for one, length in lengths.items() if length == longest}
            assert set(match.ends) <= {one for one, text in held.items() if len(text) == longest}
        for one, length in lengths.items():
            assert tree.longest(wanted, len(wanted), (one, length)) == match, "tokens known to be equal change nothing"
        assert {one: tree.length(one) for one in held} == {one: len(text) for one, text in held.items()}
