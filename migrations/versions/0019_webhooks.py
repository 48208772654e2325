"""Webhooks and their outbox, jobs that are erased, and how long a key keeps prompts, outputs, files and steps."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

_TIMES_OF_JOBS = ("erased_at", "prompts_deleted_at", "outputs_deleted_at")
_AGES_OF_KEYS = ("prompts_kept_s", "outputs_kept_s", "files_kept_s", "steps_kept_s")
_INDEXED = ("erased_at", "input_file_id", "source_file_id")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("source_file_id", sa.Text()))
    for name in _TIMES_OF_JOBS:
        op.add_column("jobs", sa.Column(name, sa.Double()))
    for name in _AGES_OF_KEYS:
        op.add_column("api_keys", sa.Column(name, sa.Double()))
    for name in _INDEXED:
        _index_where("jobs", name, f"{name} IS NOT NULL")
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("api_key_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("event_types", sa.JSON(), nullable=False),
        sa.Column("job_id", sa.Text()),
        sa.Column("all_keys", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("old_secret", sa.Text()),
        sa.Column("old_secret_until", sa.Double()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_webhook_endpoints_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoints")),
    )
    _index_where("webhook_endpoints", "job_id", "job_id IS NOT NULL")
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("endpoint_id", sa.Text(), nullable=False),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("queued_at", sa.Double(), nullable=False),
        sa.Column("next_at", sa.Double(), nullable=False),
        sa.Column("last_status_code", sa.Integer()),
        sa.Column("last_error", sa.Text()),
        sa.Column("ended_at", sa.Double()),
        sa.CheckConstraint("status IN ('pending', 'delivered', 'dead')", name=op.f("ck_webhook_deliveries_status")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_webhook_deliveries_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
    )
    op.create_index(op.f("ix_webhook_deliveries_endpoint_id"), "webhook_deliveries", ["endpoint_id"])
    op.create_index(op.f("ix_webhook_deliveries_job_id"), "webhook_deliveries", ["job_id"])
    _index_where("webhook_deliveries", "next_at", "status = 'pending'")


def downgrade() -> None:
    op.drop_table("webhook_deliveries")
    op.drop_table("webhook_endpoints")
    for name in _INDEXED:
        op.drop_index(op.f(f"ix_jobs_{name}"), "jobs")
    for name in _AGES_OF_KEYS:
        op.drop_column("api_keys", name)
    for name in ("source_file_id", *_TIMES_OF_JOBS):
        op.drop_column("jobs", name)


def _index_where(table: str, column: str, condition: str) -> None:
    where = sa.text(condition)
    op.create_index(op.f(f"ix_{table}_{column}"), table, [column], sqlite_where=where, postgresql_where=where)
