"""Rollups of decoding steps and views over them; draft trees; energy and load of workers."""

from __future__ import annotations

import importlib
from typing import Any

import sqlalchemy as sa
from alembic import op

from storage.views import create_views, drop_views

revision = "0007"
down_revision = "0004"
branch_labels = None
depends_on = None

# The views of this revision: later ones may read tables that do not exist yet.
_VIEWS = (
    "job_speedup",
    "speedup_by_model",
    "speedup_by_drafter",
    "speedup_by_hour",
    "throughput_by_minute",
    "acceptance_by_depth",
    "acceptance_by_rank",
    "acceptance_histogram",
    "tree_by_batch",
    "expected_and_accepted",
    "reliability",
    "time_by_job",
    "decisions_by_job",
    "tokens_per_joule",
)

_first = importlib.import_module("migrations.versions.0001_initial")  # the name is not an identifier


def upgrade() -> None:
    _first.drop_views()
    op.add_column("decode_steps", sa.Column("reached", sa.JSON()))
    op.add_column("workers", sa.Column("load", sa.JSON()))
    some = sa.text("error_code IS NOT NULL")
    op.create_index(
        "ix_requests_error_code", "requests", ["error_code", "job_id"], sqlite_where=some, postgresql_where=some
    )
    _create_draft_trees()
    _create_sums()
    _create_worker_energy()
    _add_up_what_is_there()
    create_views(op.get_bind(), _VIEWS)


def downgrade() -> None:
    drop_views(op.get_bind())
    for table in (
        "worker_energy",
        "step_ranks",
        "step_expectations",
        "step_depths",
        "step_batches",
        "step_minutes",
        "draft_trees",
    ):
        op.drop_table(table)
    op.drop_index("ix_requests_error_code", "requests")
    op.drop_column("workers", "load")
    op.drop_column("decode_steps", "reached")
    _first.create_views()


def _create_draft_trees() -> None:
    op.create_table(
        "draft_trees",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("request_index", sa.Integer(), nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("nodes", sa.JSON(), nullable=False),
        sa.Column("bonus", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "request_index", "choice_index", "step", name="pk_draft_trees"),
        sa.ForeignKeyConstraint(
            ["job_id", "request_index"],
            ["requests.job_id", "requests.request_index"],
            name="fk_draft_trees_requests",
            ondelete="CASCADE",
        ),
    )


def _create_sums() -> None:
    _create_sum(
        "step_minutes",
        {
            "minute": sa.BigInteger(),
            "worker_id": sa.Text(),
            "drafter": sa.Text(),
            "decision": sa.Text(),
        },
        {
            "first_steps": sa.BigInteger(),
            "first_tokens": sa.BigInteger(),
            "steps": sa.BigInteger(),
            "tokens": sa.BigInteger(),
            "tree_nodes": sa.BigInteger(),
            "accepted_tokens": sa.BigInteger(),
            "expected_accepted": sa.Double(),
            "draft_ms": sa.Double(),
            "verify_ms": sa.Double(),
            "step_ms": sa.Double(),
            "compared_steps": sa.BigInteger(),
            "compared_tokens": sa.BigInteger(),
            "compared_ms": sa.Double(),
            "plain_ms": sa.Double(),
        },
    )
    op.create_index("ix_step_minutes_minute", "step_minutes", ["minute"])
    _create_sum(
        "step_batches",
        {"drafter": sa.Text(), "batch_sequences": sa.Integer()},
        {"steps": sa.BigInteger(), "tokens": sa.BigInteger(), "tree_nodes": sa.BigInteger(), "step_ms": sa.Double()},
    )
    _create_sum(
        "step_depths",
        {"drafter": sa.Text(), "tree_depth": sa.Integer(), "accepted_tokens": sa.Integer()},
        {"steps": sa.BigInteger()},
    )
    _create_sum(
        "step_expectations",
        {"drafter": sa.Text(), "quarter": sa.Integer()},
        {"steps": sa.BigInteger(), "expected_accepted": sa.Double(), "accepted_tokens": sa.BigInteger()},
    )
    _create_sum(
        "step_ranks",
        {"drafter": sa.Text(), "child_rank": sa.Integer()},
        {"tried": sa.BigInteger(), "accepted": sa.BigInteger()},
    )


def _create_sum(table: str, keys: dict[str, Any], sums: dict[str, Any]) -> None:
    op.create_table(
        table,
        sa.Column("job_id", sa.Text(), nullable=False),
        *(sa.Column(name, kind, nullable=False, autoincrement=False) for name, kind in keys.items()),
        *(sa.Column(name, kind, nullable=False) for name, kind in sums.items()),
        sa.PrimaryKeyConstraint("job_id", *keys, name=f"pk_{table}"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=f"fk_{table}_jobs", ondelete="CASCADE"),
    )


def _create_worker_energy() -> None:
    op.create_table(
        "worker_energy",
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("minute", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("joules", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("worker_id", "minute", name="pk_worker_energy"),
    )


_MINUTES = """
INSERT INTO step_minutes
SELECT job_id, {minute}, worker_id, coalesce(drafter, ''), coalesce(decision, ''),
    sum(CASE WHEN step = 0 THEN 1 ELSE 0 END),
    sum(CASE WHEN step = 0 THEN emitted_tokens ELSE 0 END),
    sum(CASE WHEN step > 0 THEN 1 ELSE 0 END),
    sum(CASE WHEN step > 0 THEN emitted_tokens ELSE 0 END),
    sum(CASE WHEN step > 0 THEN tree_nodes ELSE 0 END),
    sum(CASE WHEN step > 0 THEN accepted_tokens ELSE 0 END),
    coalesce(sum(CASE WHEN step > 0 THEN expected_accepted END), 0.0),
    coalesce(sum(CASE WHEN step > 0 THEN draft_ms / batch_sequences END), 0.0),
    coalesce(sum(CASE WHEN step > 0 THEN verify_ms / batch_sequences END), 0.0),
    coalesce(sum(CASE WHEN step > 0 THEN step_ms / batch_sequences END), 0.0),
    sum(CASE WHEN plain_step_ms IS NOT NULL THEN 1 ELSE 0 END),
    sum(CASE WHEN plain_step_ms IS NOT NULL THEN emitted_tokens ELSE 0 END),
    coalesce(sum(CASE WHEN plain_step_ms IS NOT NULL THEN step_ms / batch_sequences END), 0.0),
    coalesce(sum(emitted_tokens * plain_step_ms / batch_sequences), 0.0)
FROM decode_steps
GROUP BY 1, 2, 3, 4, 5
"""

_BATCHES = """
INSERT INTO step_batches
SELECT job_id, coalesce(drafter, ''), batch_sequences,
    count(*), sum(emitted_tokens), sum(tree_nodes), sum(step_ms / batch_sequences)
FROM decode_steps
WHERE step > 0
GROUP BY 1, 2, 3
"""

_DEPTHS = """
INSERT INTO step_depths
SELECT job_id, coalesce(drafter, ''), tree_depth, accepted_tokens, count(*)
FROM decode_steps
WHERE step > 0
GROUP BY 1, 2, 3, 4
"""

_EXPECTATIONS = """
INSERT INTO step_expectations
SELECT job_id, coalesce(drafter, ''), {quarter},
    count(*), coalesce(sum(expected_accepted), 0.0), sum(accepted_tokens)
FROM decode_steps
WHERE tree_nodes > 0
GROUP BY 1, 2, 3
"""

# SQLite may lack floor(), but its cast truncates; PostgreSQL's cast rounds.
_WHOLE = {"sqlite": "CAST({0} AS BIGINT)", "postgresql": "CAST(floor({0}) AS BIGINT)"}


def _add_up_what_is_there() -> None:
    whole = _WHOLE[op.get_bind().dialect.name].format
    spelt = {"minute": f"{whole('ended_at / 60')} * 60", "quarter": whole("4 * coalesce(expected_accepted, 0.0)")}
    for statement in (_MINUTES, _BATCHES, _DEPTHS, _EXPECTATIONS):
        op.execute(statement.format(**spelt))
