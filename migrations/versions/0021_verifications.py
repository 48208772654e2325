"""Jobs that compute a sample of another job again, to verify its outputs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("verification_of", sa.Text()))
    is_set = sa.text("verification_of IS NOT NULL")
    op.create_index(
        op.f("ix_jobs_verification_of"), "jobs", ["verification_of"], sqlite_where=is_set, postgresql_where=is_set
    )


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_verification_of"), "jobs")
    op.drop_column("jobs", "verification_of")
