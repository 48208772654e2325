"""Event numbers for the event log, and the job that a retry repeats (`retry_of`)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0007"
branch_labels = None
depends_on = None

_TOLD = sa.text("event_number IS NOT NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("event_number", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("retry_of", sa.Text()))
    op.add_column("requests", sa.Column("event_number", sa.BigInteger()))
    op.add_column("partials", sa.Column("event_number", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("outputs", sa.Column("event_number", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("outputs", sa.Column("checkpoints", sa.JSON()))
    op.execute("UPDATE requests SET event_number = 0 WHERE status NOT IN ('queued', 'running')")
    op.create_index(
        "ix_requests_job_id_event_number_request_index",
        "requests",
        ["job_id", "event_number", "request_index"],
        sqlite_where=_TOLD,
        postgresql_where=_TOLD,
    )
    op.create_index("ix_partials_job_id_event_number", "partials", ["job_id", "event_number"])
    op.create_index(
        "ix_outputs_job_id_event_number",
        "outputs",
        ["job_id", "event_number", "request_index", "choice_index"],
    )


def downgrade() -> None:
    op.drop_index("ix_outputs_job_id_event_number", "outputs")
    op.drop_index("ix_partials_job_id_event_number", "partials")
    op.drop_index("ix_requests_job_id_event_number_request_index", "requests")
    op.drop_column("outputs", "checkpoints")
    for table in ("outputs", "partials", "requests"):
        op.drop_column(table, "event_number")
    op.drop_column("jobs", "retry_of")
    op.drop_column("jobs", "event_number")
