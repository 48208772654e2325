"""Initial schema: jobs, requests, partials, outputs, decoding steps, workers and views."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_jobs()
    _create_workers()
    _create_requests()
    _create_decode_steps()
    _create_outputs()
    _create_partials()
    create_views()


def downgrade() -> None:
    drop_views()
    for table in ("partials", "outputs", "decode_steps", "requests", "workers", "jobs"):
        op.drop_table(table)


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double()),
        sa.Column("finished_at", sa.Double()),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("cancelling_at", sa.Double()),
        sa.Column("requests_total", sa.Integer(), nullable=False),
        sa.Column("requests_completed", sa.Integer(), nullable=False),
        sa.Column("requests_failed", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("metadata", sa.JSON()),
        sa.Column("api_key_id", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("body_sha256", sa.Text()),
        sa.Column("doorbell_at", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("api_key_id", "idempotency_key", name="uq_jobs_api_key_id_idempotency_key"),
        sa.CheckConstraint(
            "status IN ('validating', 'in_progress', 'finalizing', 'cancelling',"
            " 'completed', 'failed', 'expired', 'cancelled')",
            name=op.f("ck_jobs_status"),
        ),
    )
    op.create_index("ix_jobs_created_at_id", "jobs", ["created_at", "id"])
    op.create_index("ix_jobs_status_model", "jobs", ["status", "model"])


def _create_workers() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("hostname", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("draft", sa.Text()),
        sa.Column("devices", sa.JSON(), nullable=False),
        sa.Column("context_tokens", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("last_seen_at", sa.Double(), nullable=False),
        sa.Column("stopped_at", sa.Double()),
        sa.Column("calibration", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )


def _create_requests() -> None:
    op.create_table(
        "requests",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("request_index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=False),
        sa.Column("body", sa.JSON()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("error_code", sa.Text()),
        sa.Column("error_message", sa.Text()),
        sa.Column("error_param", sa.Text()),
        sa.Column("error_status_code", sa.Integer()),
        sa.Column("lease_owner", sa.Text()),
        sa.Column("lease_number", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", sa.Double()),
        sa.Column("started_at", sa.Double()),
        sa.Column("finished_at", sa.Double()),
        sa.PrimaryKeyConstraint("job_id", "request_index", name="pk_requests"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_requests_jobs", ondelete="CASCADE"),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'completed', 'failed', 'expired', 'cancelled')",
            name=op.f("ck_requests_status"),
        ),
    )
    op.create_index("ix_requests_job_id_status_request_index", "requests", ["job_id", "status", "request_index"])


def _create_partials() -> None:
    op.create_table(
        "partials",
        *_choice_columns(),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("token_ids", sa.JSON(), nullable=False),
        sa.Column("accepted", sa.JSON(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("pieces", sa.JSON(), nullable=False),
        sa.Column("steps", sa.JSON(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("committed_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "request_index", "choice_index", "seq", name="pk_partials"),
        _of_a_request("partials"),
    )


def _create_outputs() -> None:
    op.create_table(
        "outputs",
        *_choice_columns(),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("finish_reason", sa.Text(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("accepted_tokens", sa.Integer(), nullable=False),
        sa.Column("token_ids", sa.JSON(), nullable=False),
        sa.Column("pieces", sa.JSON(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=False),
        sa.Column("last_seq", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "request_index", "choice_index", name="pk_outputs"),
        _of_a_request("outputs"),
    )


def _create_decode_steps() -> None:
    op.create_table(
        "decode_steps",
        *_choice_columns(),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("tree_nodes", sa.Integer(), nullable=False),
        sa.Column("tree_depth", sa.Integer(), nullable=False),
        sa.Column("accepted_tokens", sa.Integer(), nullable=False),
        sa.Column("emitted_tokens", sa.Integer(), nullable=False),
        sa.Column("expected_accepted", sa.Double()),
        sa.Column("draft_ms", sa.Double(), nullable=False),
        sa.Column("verify_ms", sa.Double(), nullable=False),
        sa.Column("step_ms", sa.Double(), nullable=False),
        sa.Column("batch_sequences", sa.Integer(), nullable=False),
        sa.Column("drafter", sa.Text()),
        sa.Column("plain_step_ms", sa.Double()),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "request_index", "choice_index", "step", name="pk_decode_steps"),
        _of_a_request("decode_steps"),
        sa.CheckConstraint("accepted_tokens <= tree_nodes", name=op.f("ck_decode_steps_accepted")),
        sa.CheckConstraint("batch_sequences > 0", name=op.f("ck_decode_steps_batch")),
    )


def _choice_columns() -> tuple[sa.Column[str], sa.Column[int], sa.Column[int]]:
    return (
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("request_index", sa.Integer(), nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
    )


def _of_a_request(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["job_id", "request_index"],
        ["requests.job_id", "requests.request_index"],
        name=f"fk_{table}_requests",
        ondelete="CASCADE",
    )


# The views of this revision, copied: storage.views changes, a migration must not.
# A plain step emits one token per sequence, so a token costs plain_step_ms / batch_sequences.
# Steps without a comparable plain time (they shared a prefill) are left out on both sides.
_JOB_SPEEDUP = """
CREATE VIEW job_speedup AS
SELECT
    job_id,
    steps,
    emitted_tokens,
    1.0 * emitted_tokens / steps AS mean_emitted_per_step,
    1000.0 * emitted_tokens / NULLIF(spent_ms, 0) AS tokens_per_s,
    1000.0 * emitted_tokens / NULLIF(plain_ms, 0) AS plain_tokens_per_s,
    plain_ms / NULLIF(spent_ms, 0) AS speedup,
    'calibration' AS source
FROM (
    SELECT
        job_id,
        count(*) AS steps,
        CAST(sum(emitted_tokens) AS BIGINT) AS emitted_tokens,
        sum(step_ms / batch_sequences) AS spent_ms,
        sum(emitted_tokens * plain_step_ms / batch_sequences) AS plain_ms
    FROM decode_steps
    WHERE plain_step_ms IS NOT NULL
    GROUP BY job_id
) AS comparable
"""

# By depth: trees that reach it (`tried`), and those of them with an accepted draft token at this depth.
_ACCEPTANCE_BY_DEPTH = """
CREATE VIEW acceptance_by_depth AS
WITH RECURSIVE reached (job_id, depth, tree_depth, accepted_tokens, steps) AS (
    SELECT job_id, 1, tree_depth, accepted_tokens, count(*)
    FROM decode_steps
    WHERE tree_depth >= 1
    GROUP BY job_id, tree_depth, accepted_tokens
    UNION ALL
    SELECT job_id, depth + 1, tree_depth, accepted_tokens, steps
    FROM reached
    WHERE depth < tree_depth
)
SELECT
    job_id,
    depth,
    CAST(sum(steps) AS BIGINT) AS tried,
    CAST(sum(CASE WHEN accepted_tokens >= depth THEN steps ELSE 0 END) AS BIGINT) AS accepted,
    1.0 * sum(CASE WHEN accepted_tokens >= depth THEN steps ELSE 0 END) / sum(steps) AS rate
FROM reached
GROUP BY job_id, depth
"""

# `minute`: start of the minute, Unix seconds.
_THROUGHPUT_BY_MINUTE = """
CREATE VIEW throughput_by_minute AS
SELECT
    {minute} AS minute,
    job_id,
    CAST(sum(emitted_tokens) AS BIGINT) AS tokens,
    count(*) AS steps
FROM decode_steps
GROUP BY {minute}, job_id
"""

# SQLite may lack floor(), but its cast truncates; PostgreSQL's cast rounds.
_MINUTE = {
    "sqlite": "CAST(ended_at / 60 AS INTEGER) * 60",
    "postgresql": "CAST(floor(ended_at / 60) AS BIGINT) * 60",
}


def create_views() -> None:
    """Create the views of this revision. Downgrades of later revisions restore them by this function."""
    for ddl in (_JOB_SPEEDUP, _ACCEPTANCE_BY_DEPTH, _THROUGHPUT_BY_MINUTE):
        op.execute(ddl.strip().format(minute=_MINUTE[op.get_bind().dialect.name]))


def drop_views() -> None:
    for name in ("job_speedup", "acceptance_by_depth", "throughput_by_minute"):
        op.execute(f"DROP VIEW IF EXISTS {name}")
