"""Files and their chunks, and batches: jobs with an input file and output files."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0008"
branch_labels = None
depends_on = None

_BATCH_COLUMNS: tuple[tuple[str, type[sa.types.TypeEngine[Any]]], ...] = (
    ("input_file_id", sa.Text),
    ("completion_window", sa.Text),
    ("output_expires_after_s", sa.Double),
    ("validated_at", sa.Double),
    ("finalizing_at", sa.Double),
    ("output_file_id", sa.Text),
    ("error_file_id", sa.Text),
    ("errors", sa.JSON),
    ("usage", sa.JSON),
    ("clerk_until", sa.Double),
)


def upgrade() -> None:
    _create_files()
    op.create_table(
        "file_chunks",
        sa.Column("file_id", sa.Text(), nullable=False),
        sa.Column("chunk_index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("file_id", "chunk_index", name="pk_file_chunks"),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name="fk_file_chunks_files", ondelete="CASCADE"),
    )
    for name, kind in _BATCH_COLUMNS:
        op.add_column("jobs", sa.Column(name, kind()))
    op.add_column("jobs", sa.Column("clerk_number", sa.Integer(), server_default="0", nullable=False))
    op.execute("UPDATE jobs SET validated_at = created_at")
    op.create_index("ix_jobs_api_key_id_created_at_id", "jobs", ["api_key_id", "created_at", "id"])
    op.add_column("outputs", sa.Column("first_of_prompt", sa.Boolean(), server_default=sa.true(), nullable=False))
    op.execute(sa.text("UPDATE outputs SET first_of_prompt = :no WHERE choice_index > 0").bindparams(no=False))


def downgrade() -> None:
    op.drop_column("outputs", "first_of_prompt")
    op.drop_index("ix_jobs_api_key_id_created_at_id", "jobs")
    for name in ("clerk_number", *(name for name, _ in _BATCH_COLUMNS)):
        op.drop_column("jobs", name)
    op.drop_table("file_chunks")
    op.drop_table("files")


def _create_files() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double()),
        sa.Column("api_key_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.CheckConstraint("status IN ('writing', 'ready', 'deleted', 'cleared')", name=op.f("ck_files_status")),
    )
    op.create_index("ix_files_created_at_id", "files", ["created_at", "id"])
    op.create_index("ix_files_api_key_id_created_at_id", "files", ["api_key_id", "created_at", "id"])
    op.create_index("ix_files_status_expires_at", "files", ["status", "expires_at"])
