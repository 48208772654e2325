"""The views: numbers for whoever knows only SQL. Plain SQL that the sqlite3 and psql shells run as it stands.

One text for both databases; what they spell differently is filled in by `create_views`. Knows no tables but by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection, text

# A plain step gives every sequence of the batch one token, so a token costs a sequence plain_step_ms / batch_sequences.
# Steps without a comparable plain time (they shared a prefill) count on neither side.
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

# At each depth: how many trees reached it, and in how many of them a draft token of that depth was accepted.
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

# `minute` is the Unix second at which the minute begins.
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

VIEWS: Final[Mapping[str, str]] = {
    "job_speedup": _JOB_SPEEDUP,
    "acceptance_by_depth": _ACCEPTANCE_BY_DEPTH,
    "throughput_by_minute": _THROUGHPUT_BY_MINUTE,
}

# SQLite may lack floor(), and its cast cuts off; PostgreSQL's cast rounds.
_MINUTE: Final[Mapping[str, str]] = {
    "sqlite": "CAST(ended_at / 60 AS INTEGER) * 60",
    "postgresql": "CAST(floor(ended_at / 60) AS BIGINT) * 60",
}


def create_views(connection: Connection) -> None:
    """Create all views; their tables must exist."""
    for ddl in VIEWS.values():
        connection.execute(text(ddl.strip().format(minute=_MINUTE[connection.dialect.name])))


def drop_views(connection: Connection) -> None:
    """Drop all views that exist."""
    for name in VIEWS:
        connection.execute(text(f"DROP VIEW IF EXISTS {name}"))
