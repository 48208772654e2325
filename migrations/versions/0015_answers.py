"""Answers split into reasoning and content; sampling parameters of the model's generation config."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("requests", sa.Column("answer_format", sa.JSON()))
    op.add_column("requests", sa.Column("sampling_defaults", sa.JSON()))
    op.add_column("outputs", sa.Column("reasoning_tokens", sa.Integer()))


def downgrade() -> None:
    op.drop_column("outputs", "reasoning_tokens")
    op.drop_column("requests", "sampling_defaults")
    op.drop_column("requests", "answer_format")
