"""Recorded draft trees: limited in number, and consistent with the statistics of their steps."""

from __future__ import annotations

from sqlalchemy import select

from storage.models import DecodeStep, DraftTree, StepRank
from storage.session import Database
from tests.unit.worker.serving.test_runner import AT_END, DRAFTED, Worker, submit
from worker.engine.stats import TracedTree
from worker.text.tree_rows import tree_row

#        0
#      1   2
#     3 4
SHOWN = TracedTree(
    (-1, 0, 0, 1, 1), (9, 10, 11, 12, 13), (1.0, 0.3, 0.6, 0.1, 0.2), (True, True, False, True, False), 14
)


def test_a_tree_is_recorded_with_its_texts() -> None:
    row = tree_row(SHOWN, lambda token: "\0" if token == 9 else f"<{token}>")
    assert row.nodes[0] == (-1, 9, "\ufffd", 1.0, True)
    assert row.nodes[2] == (0, 11, "<11>", 0.6, False)
    assert row.bonus == "<14>"


def test_trees_of_the_first_steps_are_stored_and_match_the_step_statistics(database: Database) -> None:
    submit(database, "one", "two", record_trees=5)
    submit(database, "three", job_id="batch_2")
    Worker(database, "a").run()

    with database.read() as session:
        trees = session.scalars(select(DraftTree)).all()
        steps = {(s.request_index, s.step): s for s in session.scalars(select(DecodeStep)) if s.job_id == "batch_1"}

    assert {(t.job_id, t.request_index, t.step) for t in trees} == {("batch_1", r, s) for r in (0, 1) for s in range(5)}
    assert any(len(tree.nodes) > 1 for tree in trees)
    for tree in trees:
        step = steps[tree.request_index, tree.step]
        assert len(tree.nodes) == step.tree_nodes + 1
        assert sum(accepted for *_, accepted in tree.nodes) == step.accepted_tokens + 1
        assert all(parent < node for node, (parent, *_) in enumerate(tree.nodes))


def test_every_tree_marks_the_tokens_that_the_target_sampled(database: Database) -> None:
    submit(database, DRAFTED, "two")
    Worker(database, "a", interval_s=AT_END).run()

    with database.read() as session:
        steps = session.scalars(select(DecodeStep)).all()
        ranks = session.scalars(select(StepRank)).all()

    assert any(step.accepted_tokens for step in steps)
    for step in steps:
        assert (step.reached is not None) == (step.tree_nodes > 0)
        drawn = [rank for _, rank in step.reached or [] if rank is not None]
        assert len(drawn) == step.accepted_tokens
        assert all(rank < children for children, rank in step.reached or [] if rank is not None)
        assert sum(children for children, _ in step.reached or []) <= step.tree_nodes
    assert sum(rank.accepted for rank in ranks) == sum(step.accepted_tokens for step in steps)
    assert sum(rank.tried for rank in ranks) == sum(children for step in steps for children, _ in step.reached or [])
