"""Answers that are copied from earlier ones: identities of requests, sources of outputs, counts of jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0021"
branch_labels = None
depends_on = None

_INDEX = "ix_requests_identity_status"


def upgrade() -> None:
    zero = sa.text("0")
    op.add_column("jobs", sa.Column("requests_cached", sa.Integer(), nullable=False, server_default=zero))
    op.add_column("jobs", sa.Column("cached_prompt_tokens", sa.BigInteger(), nullable=False, server_default=zero))
    op.add_column("jobs", sa.Column("cached_completion_tokens", sa.BigInteger(), nullable=False, server_default=zero))
    op.add_column("requests", sa.Column("identity", sa.Text()))
    op.add_column("requests", sa.Column("cache_scope", sa.Text()))
    op.add_column("outputs", sa.Column("cached_from", sa.Text()))
    op.add_column("api_keys", sa.Column("cache", sa.Boolean(), nullable=False, server_default=sa.true()))
    is_set = sa.text("identity IS NOT NULL")
    op.create_index(_INDEX, "requests", ["identity", "status"], sqlite_where=is_set, postgresql_where=is_set)


def downgrade() -> None:
    op.drop_index(_INDEX, "requests")
    op.drop_column("api_keys", "cache")
    op.drop_column("outputs", "cached_from")
    for column in ("cache_scope", "identity"):
        op.drop_column("requests", column)
    for column in ("cached_completion_tokens", "cached_prompt_tokens", "requests_cached"):
        op.drop_column("jobs", column)
