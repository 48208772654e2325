"""What an answer returns of its prompt: token ids and log-probabilities."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("outputs", sa.Column("prompt", sa.JSON()))


def downgrade() -> None:
    op.drop_column("outputs", "prompt")
