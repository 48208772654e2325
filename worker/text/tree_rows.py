"""Convert the engine's draft trees to rows with readable tokens, for requests that record their trees."""

from __future__ import annotations

from collections.abc import Callable

from storage.dialect import storable
from storage.records import TreeRow
from worker.engine.stats import TracedTree


def tree_row(shown: TracedTree, text_of: Callable[[int], str]) -> TreeRow:
    """Return a tree as a row: parent, token id, text, value and acceptance of each node."""
    nodes = tuple(
        (parent, token, storable(text_of(token)), round(value, 4), accepted)
        for parent, token, value, accepted in zip(
            shown.parents, shown.tokens, shown.values, shown.accepted, strict=True
        )
    )
    return TreeRow(nodes, storable(text_of(shown.bonus)))
