"""Names, labels, priorities, concurrency limits and pauses of jobs."""

from __future__ import annotations

import json
import re
from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0020"
branch_labels = None
depends_on = None

_JOBS_AT_ONCE: Final = 1_000
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")  # in PostgreSQL
_NAMED: Final = sa.text("name IS NOT NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("name", sa.Text()))
    op.add_column("jobs", sa.Column("paused_at", sa.Double()))
    op.add_column("jobs", sa.Column("pause_reason", sa.Text()))
    op.add_column("jobs", sa.Column("priority_class", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("max_concurrent", sa.Integer()))
    op.create_index(op.f("ix_jobs_status_created_at_id"), "jobs", ["status", "created_at", "id"])
    op.create_index(
        "ix_jobs_name_created_at_id",
        "jobs",
        ["name", "created_at", "id"],
        sqlite_where=_NAMED,
        postgresql_where=_NAMED,
    )
    op.create_table(
        "job_labels",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_labels_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key", name=op.f("pk_job_labels")),
    )
    op.create_index(
        op.f("ix_job_labels_key_value_created_at_job_id"), "job_labels", ["key", "value", "created_at", "job_id"]
    )
    op.create_table(
        "job_texts",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_texts_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_job_texts")),
    )
    _index_jobs(op.get_bind())


def downgrade() -> None:
    op.drop_table("job_texts")
    op.drop_table("job_labels")
    op.drop_index("ix_jobs_name_created_at_id", "jobs")
    op.drop_index(op.f("ix_jobs_status_created_at_id"), "jobs")
    for column in ("max_concurrent", "priority_class", "pause_reason", "paused_at", "name"):
        op.drop_column("jobs", column)


_JOBS: Final = sa.table(
    "jobs",
    sa.column("id", sa.Text),
    sa.column("created_at", sa.Double),
    sa.column("metadata", sa.Text),
    sa.column("priority", sa.Integer),
    sa.column("name", sa.Text),
)
_LABELS: Final = sa.table(
    "job_labels", sa.column("job_id"), sa.column("key"), sa.column("value"), sa.column("created_at")
)
_TEXTS: Final = sa.table("job_texts", sa.column("job_id"), sa.column("text"))


def _index_jobs(connection: sa.Connection) -> None:
    """Write the names, labels and texts of the jobs that exist, from their metadata. Interactive requests have none."""
    after = ""
    while True:
        metadata = sa.cast(_JOBS.c.metadata, sa.Text).label("metadata")
        query = sa.select(_JOBS.c.id, _JOBS.c.created_at, metadata).where(_JOBS.c.priority == 0, _JOBS.c.id > after)
        rows = connection.execute(query.order_by(_JOBS.c.id).limit(_JOBS_AT_ONCE)).all()
        if not rows:
            return
        given = [(row.id, row.created_at, _pairs(row.metadata)) for row in rows]
        named = [{"job": job_id, "given": _name(pairs)} for job_id, _, pairs in given if _name(pairs)]
        labels = [
            {"job_id": job_id, "key": key, "value": value, "created_at": created_at}
            for job_id, created_at, pairs in given
            for key, value in pairs.items()
        ]
        if named:
            update = _JOBS.update().where(_JOBS.c.id == sa.bindparam("job")).values(name=sa.bindparam("given"))
            connection.execute(update, named)
        if labels:
            connection.execute(_LABELS.insert(), labels)
        texts = [{"job_id": job_id, "text": _text(pairs)} for job_id, _, pairs in given if pairs]
        if texts:
            connection.execute(_TEXTS.insert(), texts)
        after = rows[-1].id


def _pairs(metadata: str | None) -> dict[str, str]:
    pairs = (json.loads(metadata) if metadata else None) or {}
    return {_UNSTORABLE.sub("\ufffd", key): _UNSTORABLE.sub("\ufffd", str(value)) for key, value in pairs.items()}


def _name(pairs: dict[str, str]) -> str:
    return " ".join(pairs.get("name", "").split())[:128]


def _text(pairs: dict[str, str]) -> str:
    return "\n".join([_name(pairs), *(f"{key}={value}" for key, value in pairs.items())]).casefold()
