"""Column `decision` of steps: a tree, or the reason not to speculate."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("decode_steps", sa.Column("decision", sa.Text()))


def downgrade() -> None:
    op.drop_column("decode_steps", "decision")
