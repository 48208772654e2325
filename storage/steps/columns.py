"""The steps of a choice as columns of whole numbers: what a worker collects, a checkpoint holds and a row packs.

A column per value, an element per step: no object a step. Times are hundredths of a millisecond, expectations are
thousandths, `ended_ms` is Unix milliseconds. Rounding happens here, once: rollups, statistics and the view
`decode_steps` all see the rounded values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Final, Self

from storage.records import StepRow, TreeRow

MS_UNITS: Final = 100  # hundredths of a millisecond
EXPECTED_UNITS: Final = 1_000  # thousandths of a token
MAX_VALUE: Final = 2**31 - 1  # larger values are cut: 5.9 hours of a step

Reached = Sequence[Sequence[int | None]]


@dataclass(slots=True)
class StepColumns:
    """Steps of one choice in order. All lists have one element per step."""

    ended_ms: list[int] = field(default_factory=list)
    tree_nodes: list[int] = field(default_factory=list)
    tree_depth: list[int] = field(default_factory=list)
    accepted_tokens: list[int] = field(default_factory=list)
    emitted_tokens: list[int] = field(default_factory=list)
    expected_accepted: list[int | None] = field(default_factory=list)  # thousandths
    draft_ms: list[int] = field(default_factory=list)
    verify_ms: list[int] = field(default_factory=list)
    step_ms: list[int] = field(default_factory=list)
    batch_sequences: list[int] = field(default_factory=list)
    plain_step_ms: list[int | None] = field(default_factory=list)
    drafter: list[str | None] = field(default_factory=list)
    decision: list[str | None] = field(default_factory=list)
    reached: list[str | None] = field(default_factory=list)  # compact (reached_text); None: no tree
    preemptions: list[int] = field(default_factory=list)
    recomputed_tokens: list[int] = field(default_factory=list)
    trees: dict[int, TreeRow] = field(default_factory=dict, compare=False)  # recorded draft trees, by position

    def __len__(self) -> int:
        return len(self.ended_ms)

    def add(
        self,
        *,
        ended_at: float,
        tree_nodes: int,
        tree_depth: int,
        accepted_tokens: int,
        emitted_tokens: int,
        expected_accepted: float | None,
        draft_ms: float,
        verify_ms: float,
        step_ms: float,
        batch_sequences: int,
        plain_step_ms: float | None,
        drafter: str | None,
        decision: str | None = None,
        reached: Reached | None = None,
        preemptions: int = 0,
        recomputed_tokens: int = 0,
        tree: TreeRow | None = None,
    ) -> None:
        """Add a step; the arguments are columns of the view `decode_steps`."""
        if tree is not None:
            self.trees[len(self)] = tree
        self.ended_ms.append(int(ended_at * 1e3 + 0.5))
        self.tree_nodes.append(tree_nodes)
        self.tree_depth.append(tree_depth)
        self.accepted_tokens.append(accepted_tokens)
        self.emitted_tokens.append(emitted_tokens)
        self.expected_accepted.append(None if expected_accepted is None else _units(expected_accepted, EXPECTED_UNITS))
        self.draft_ms.append(_units(draft_ms, MS_UNITS))
        self.verify_ms.append(_units(verify_ms, MS_UNITS))
        self.step_ms.append(_units(step_ms, MS_UNITS))
        self.batch_sequences.append(batch_sequences)
        self.plain_step_ms.append(None if plain_step_ms is None else _units(plain_step_ms, MS_UNITS))
        self.drafter.append(drafter)
        self.decision.append(decision)
        self.reached.append(None if reached is None else reached_text(reached))
        self.preemptions.append(preemptions)
        self.recomputed_tokens.append(recomputed_tokens)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Add a step from a row of an older version; columns that this version does not know are left out."""
        known = {name: value for name, value in row.items() if name in _ARGUMENTS}
        tree = known.get("tree")
        self.add(**known | {"tree": None if tree is None else TreeRow(**tree)})

    def extend(self, other: StepColumns) -> None:
        """Add the steps of another."""
        self.trees |= {len(self) + position: tree for position, tree in other.trees.items()}
        for name in COLUMNS:
            getattr(self, name).extend(getattr(other, name))

    def part(self, first: int, end: int) -> StepColumns:
        """Return the steps from `first` up to `end`, without their draft trees."""
        return StepColumns(*(getattr(self, name)[first:end] for name in COLUMNS))

    def rows(self) -> Iterator[StepRow]:
        """Yield the steps as rows of the view `decode_steps`, numbered from 0."""
        for step, values in enumerate(zip(*(getattr(self, name) for name in COLUMNS), strict=True)):
            row = dict(zip(COLUMNS, values, strict=True))
            expected, plain, reached = row["expected_accepted"], row["plain_step_ms"], row["reached"]
            row |= {name: row[name] / MS_UNITS for name in ("draft_ms", "verify_ms", "step_ms")}
            row["expected_accepted"] = None if expected is None else expected / EXPECTED_UNITS
            row["plain_step_ms"] = None if plain is None else plain / MS_UNITS
            row["ended_at"] = row.pop("ended_ms") / 1_000
            row["reached"] = None if reached is None else reached_nodes(reached)
            yield StepRow(step=step, tree=self.trees.get(step), **row)

    def to_json(self) -> dict[str, Any]:
        """Return the form of a checkpoint: a column that is the same in all steps is one value."""
        stored: dict[str, Any] = {"steps": len(self)}
        for name in COLUMNS:
            values: list[Any] = getattr(self, name)
            stored[name] = values[0] if values and values.count(values[0]) == len(values) else values
        if self.trees:
            stored["trees"] = [(position, tree.nodes, tree.bonus) for position, tree in self.trees.items()]
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Return the steps of a checkpoint; columns that it lacks are 0."""
        steps = stored["steps"]
        columns = (stored.get(name, 0) for name in COLUMNS)
        trees = {
            position: TreeRow(tuple(map(tuple, nodes)), bonus) for position, nodes, bonus in stored.get("trees", ())
        }
        lists: list[Any] = [value if isinstance(value, list) else [value] * steps for value in columns]
        return cls(*lists, trees=trees)  # type: ignore[misc]

    @classmethod
    def of(cls, rows: Iterable[StepRow]) -> Self:
        """Return these steps; their numbers are their positions."""
        columns = cls()
        for row in rows:
            columns.add(**{name: getattr(row, name) for name in _ARGUMENTS})
        return columns


# Names of the columns.
COLUMNS: Final = tuple(column.name for column in fields(StepColumns) if column.name != "trees")
_ARGUMENTS: Final = frozenset(name for name in StepRow.__dataclass_fields__ if name != "step")


def reached_text(reached: Reached) -> str:
    """Return the column `reached` of a step as compact text: [[2, 0], [1, None]] is `2,0;1,-`."""
    return _reached_text(tuple(map(tuple, reached)))


@lru_cache(maxsize=4096)  # few kinds make up nearly all steps
def _reached_text(reached: tuple[tuple[int, int | None], ...]) -> str:
    return ";".join(f"{children},{'-' if rank is None else rank}" for children, rank in reached)


@lru_cache(maxsize=4096)
def reached_nodes(text: str) -> tuple[tuple[int, int | None], ...]:
    """Return the nodes of a compact text: (draft children, rank of the accepted one)."""
    pairs = (node.split(",") for node in text.split(";")) if text else ()
    return tuple((int(children), None if rank == "-" else int(rank)) for children, rank in pairs)


def _units(value: float, units: int) -> int:
    """Return a value in whole units, between 0 and MAX_VALUE; NaN is 0."""
    scaled = value * units
    if 0 <= scaled < MAX_VALUE:
        return int(scaled + 0.5)
    return MAX_VALUE - 1 if scaled > 0 else 0


def stored_steps(columns: Mapping[str, Any] | None, rows: Iterable[Mapping[str, Any]]) -> StepColumns:
    """Return the steps of a checkpoint: its columns, or the rows that an older version wrote."""
    if columns is not None:
        return StepColumns.from_json(columns)
    steps = StepColumns()
    for row in rows:
        steps.add_row(row)
    return steps
