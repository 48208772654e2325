"""Decoding steps in packed columns; `decode_steps` becomes a view. storage.steps.conversion packs existing rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from alembic import op

from storage.steps.columns import StepColumns
from storage.steps.view import FIRST_COLUMNS, UNPACKED, create_step_view, drop_step_view, packed_select

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_COLUMNS = (
    "ended_ms",
    "tree_nodes",
    "tree_depth",
    "accepted_tokens",
    "emitted_tokens",
    "expected_accepted",
    "draft_ms",
    "verify_ms",
    "step_ms",
    "batch_sequences",
    "plain_step_ms",
    "preemptions",
    "recomputed_tokens",
)
_OPTIONAL = ("expected_accepted", "plain_step_ms")
_LATER = ("preemptions", "recomputed_tokens")
_NUMBERED = ("drafter", "decision", "reached", "drafters", "decisions", "reached_lists")


def upgrade() -> None:
    op.add_column("partials", sa.Column("step_columns", sa.JSON()))
    _create_packed_steps()
    if op.get_bind().execute(sa.text("SELECT 1 FROM decode_steps LIMIT 1")).first() is None:
        op.drop_table("decode_steps")
    else:
        op.rename_table("decode_steps", UNPACKED)
    create_step_view(op.get_bind())


def downgrade() -> None:
    bind = op.get_bind()
    drop_step_view(bind)
    if sa.inspect(bind).has_table(UNPACKED):
        op.rename_table(UNPACKED, "decode_steps")
    else:
        _create_decode_steps()
    columns = ", ".join(FIRST_COLUMNS)
    expanded = f"INSERT INTO decode_steps ({columns}) {packed_select(bind.dialect.name, FIRST_COLUMNS)}"
    bind.execute(sa.text(expanded))
    op.drop_table("packed_steps")
    _expand_checkpoints(bind)
    op.drop_column("partials", "step_columns")


def _create_packed_steps() -> None:
    op.create_table(
        "packed_steps",
        *_choice_columns(),
        sa.Column("first_step", sa.Integer(), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        *(_minimum(name) for name in _COLUMNS),
        *(sa.Column(name, sa.Text()) for name in (*_COLUMNS, *_NUMBERED)),
        sa.PrimaryKeyConstraint("job_id", "request_index", "choice_index", "first_step", name="pk_packed_steps"),
        _of_a_request("packed_steps"),
        sa.CheckConstraint("steps > 0", name=op.f("ck_packed_steps_steps")),
    )


def _minimum(name: str) -> sa.Column[int]:
    return sa.Column(
        f"min_{name}",
        sa.BigInteger() if name == "ended_ms" else sa.Integer(),
        nullable=name in _OPTIONAL,
        server_default="0" if name in _LATER else None,
    )


def _create_decode_steps() -> None:
    op.create_table(
        "decode_steps",
        *_choice_columns(),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("tree_nodes", sa.Integer(), nullable=False),
        sa.Column("tree_depth", sa.Integer(), nullable=False),
        sa.Column("accepted_tokens", sa.Integer(), nullable=False),
        sa.Column("emitted_tokens", sa.Integer(), nullable=False),
        sa.Column("expected_accepted", sa.Double()),
        sa.Column("draft_ms", sa.Double(), nullable=False),
        sa.Column("verify_ms", sa.Double(), nullable=False),
        sa.Column("step_ms", sa.Double(), nullable=False),
        sa.Column("batch_sequences", sa.Integer(), nullable=False),
        sa.Column("drafter", sa.Text()),
        sa.Column("plain_step_ms", sa.Double()),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("decision", sa.Text()),
        sa.Column("reached", sa.JSON()),
        sa.PrimaryKeyConstraint("job_id", "request_index", "choice_index", "step", name="pk_decode_steps"),
        _of_a_request("decode_steps"),
        sa.CheckConstraint("accepted_tokens <= tree_nodes", name=op.f("ck_decode_steps_accepted")),
        sa.CheckConstraint("batch_sequences > 0", name=op.f("ck_decode_steps_batch")),
    )


def _choice_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("request_index", sa.Integer(), nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
    ]


def _of_a_request(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["job_id", "request_index"],
        ["requests.job_id", "requests.request_index"],
        name=f"fk_{table}_requests",
        ondelete="CASCADE",
    )


_KEY = ("job_id", "request_index", "choice_index", "seq")
_PARTIALS = sa.table(
    "partials", *(sa.column(name) for name in _KEY), sa.column("steps", sa.JSON), sa.column("step_columns", sa.JSON)
)


def _expand_checkpoints(bind: sa.Connection) -> None:
    """Write the steps of open choices as rows again."""
    columns = _PARTIALS.c
    packed = columns.step_columns.cast(sa.Text) != "null"
    for *key, stored in bind.execute(
        sa.select(*(columns[name] for name in _KEY), columns.step_columns).where(packed)
    ).all():
        same = [columns[name] == value for name, value in zip(_KEY, key, strict=True)]
        steps = [asdict(row) for row in StepColumns.from_json(stored).rows()]
        bind.execute(sa.update(_PARTIALS).where(*same).values(steps=steps))
