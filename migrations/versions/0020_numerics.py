"""What fixes the bits of a text (device kind, dtype, weights, kernels) in checkpoints, outputs and workers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0017"
branch_labels = None
depends_on = None

_TABLES = ("outputs", "partials", "workers")


def upgrade() -> None:
    op.create_table(
        "numerics",
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("parts", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_numerics")),
    )
    for table in _TABLES:
        op.add_column(table, sa.Column("numerics", sa.Text()))


def downgrade() -> None:
    for table in _TABLES:
        op.drop_column(table, "numerics")
    op.drop_table("numerics")
