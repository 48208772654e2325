"""Log-probabilities of tokens, for requests with `logprobs`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("partials", sa.Column("logprobs", sa.JSON()))
    op.add_column("outputs", sa.Column("logprobs", sa.JSON()))


def downgrade() -> None:
    op.drop_column("outputs", "logprobs")
    op.drop_column("partials", "logprobs")
