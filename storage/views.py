"""SQL views of the statistics, for the sqlite3 and psql shells. One text for both databases.

The views read the sums of storage.rollups, so that they are fast for any number of steps. This module knows the tables
by name only, because storage.models imports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from sqlalchemy import Connection, text

# Columns of each comparison with plain decoding. `plain_ms` is an estimate by the worker's cost curve, measured at
# start-up and corrected by every step. Steps that were plain by decision check it: `plain_check` is their measured over
# their estimated time, so speedup * plain_check is the speed-up measured by the job's own plain steps.
_SPEEDUP_COLUMNS = """
    CAST(sum(compared_steps) AS BIGINT) AS steps,
    CAST(sum(compared_tokens) AS BIGINT) AS emitted_tokens,
    1.0 * sum(compared_tokens) / NULLIF(sum(compared_steps), 0) AS mean_emitted_per_step,
    1000.0 * sum(compared_tokens) / NULLIF(sum(compared_ms), 0) AS tokens_per_s,
    1000.0 * sum(compared_tokens) / NULLIF(sum(plain_ms), 0) AS plain_tokens_per_s,
    sum(plain_ms) / NULLIF(sum(compared_ms), 0) AS speedup,
    'calibration' AS source,
    CAST(sum(CASE WHEN decision IN ('probe', 'guard', 'off') THEN compared_steps ELSE 0 END) AS BIGINT) AS plain_steps,
    sum(CASE WHEN decision IN ('probe', 'guard', 'off') THEN compared_ms END)
        / NULLIF(sum(CASE WHEN decision IN ('probe', 'guard', 'off') THEN plain_ms END), 0) AS plain_check
"""

_JOB_SPEEDUP = f"""
CREATE VIEW job_speedup AS
SELECT
    job_id,{_SPEEDUP_COLUMNS}
FROM step_minutes
GROUP BY job_id
HAVING sum(compared_steps) > 0
"""

_SPEEDUP_BY_MODEL = f"""
CREATE VIEW speedup_by_model AS
SELECT
    model,{_SPEEDUP_COLUMNS}
FROM step_minutes
JOIN jobs ON jobs.id = step_minutes.job_id
GROUP BY model
HAVING sum(compared_steps) > 0
"""

# drafter '': steps without a tree. Their speed-up shows the cost of draft lookups that led to no tree.
_SPEEDUP_BY_DRAFTER = f"""
CREATE VIEW speedup_by_drafter AS
SELECT
    job_id,
    drafter,{_SPEEDUP_COLUMNS}
FROM step_minutes
GROUP BY job_id, drafter
HAVING sum(compared_steps) > 0
"""

# `hour`: start of the hour, Unix seconds.
_SPEEDUP_BY_HOUR = f"""
CREATE VIEW speedup_by_hour AS
SELECT
    minute - minute % 3600 AS hour,
    job_id,{_SPEEDUP_COLUMNS}
FROM step_minutes
GROUP BY minute - minute % 3600, job_id
HAVING sum(compared_steps) > 0
"""

# `minute`: start of the minute, Unix seconds.
_THROUGHPUT_BY_MINUTE = """
CREATE VIEW throughput_by_minute AS
SELECT
    minute,
    job_id,
    CAST(sum(tokens + first_tokens) AS BIGINT) AS tokens,
    CAST(sum(steps + first_steps) AS BIGINT) AS steps,
    sum(plain_ms) / NULLIF(sum(compared_ms), 0) AS speedup
FROM step_minutes
GROUP BY minute, job_id
"""

# By depth: trees that reach it (`tried`), and those of them with an accepted draft token at this depth.
_ACCEPTANCE_BY_DEPTH = """
CREATE VIEW acceptance_by_depth AS
WITH RECURSIVE depths (depth, last) AS (
    SELECT 1, (SELECT max(tree_depth) FROM step_depths)
    UNION ALL
    SELECT depth + 1, last FROM depths WHERE depth < last
)
SELECT
    job_id,
    depth,
    CAST(sum(steps) AS BIGINT) AS tried,
    CAST(sum(CASE WHEN accepted_tokens >= depth THEN steps ELSE 0 END) AS BIGINT) AS accepted,
    1.0 * sum(CASE WHEN accepted_tokens >= depth THEN steps ELSE 0 END) / sum(steps) AS rate
FROM step_depths
JOIN depths ON depth <= tree_depth
GROUP BY job_id, depth
"""

# By rank among the draft children of a node that the target reached; child_rank 0 has the highest draft probability.
_ACCEPTANCE_BY_RANK = """
CREATE VIEW acceptance_by_rank AS
SELECT
    job_id,
    child_rank,
    CAST(sum(tried) AS BIGINT) AS tried,
    CAST(sum(accepted) AS BIGINT) AS accepted,
    1.0 * sum(accepted) / sum(tried) AS rate
FROM step_ranks
GROUP BY job_id, child_rank
"""

# Steps by number of accepted draft tokens, without step 0, the token from prefill.
_ACCEPTANCE_HISTOGRAM = """
CREATE VIEW acceptance_histogram AS
SELECT
    job_id,
    accepted_tokens,
    CAST(sum(steps) AS BIGINT) AS steps,
    1.0 * sum(steps) / sum(sum(steps)) OVER (PARTITION BY job_id) AS share
FROM step_depths
GROUP BY job_id, accepted_tokens
"""

_TREE_BY_BATCH = """
CREATE VIEW tree_by_batch AS
SELECT
    job_id,
    batch_sequences,
    CAST(sum(steps) AS BIGINT) AS steps,
    1.0 * sum(tree_nodes) / sum(steps) AS mean_tree_nodes,
    1.0 * sum(CASE WHEN drafter <> '' THEN steps ELSE 0 END) / sum(steps) AS share_with_tree,
    1.0 * sum(tokens) / sum(steps) AS mean_emitted_per_step,
    sum(step_ms) * batch_sequences / sum(steps) AS mean_step_ms
FROM step_batches
GROUP BY job_id, batch_sequences
"""

# Steps with a tree. `miscalibration` 0: drafts are accepted exactly as often as expected.
_EXPECTED_AND_ACCEPTED = """
CREATE VIEW expected_and_accepted AS
SELECT
    job_id,
    drafter,
    CAST(sum(steps) AS BIGINT) AS steps,
    sum(expected_accepted) / sum(steps) AS mean_expected,
    1.0 * sum(accepted_tokens) / sum(steps) AS mean_accepted,
    abs(sum(expected_accepted) - sum(accepted_tokens)) / NULLIF(sum(accepted_tokens), 0) AS miscalibration
FROM step_expectations
GROUP BY job_id, drafter
"""

_RELIABILITY = """
CREATE VIEW reliability AS
SELECT
    job_id,
    quarter / 4.0 AS expected_from,
    CAST(sum(steps) AS BIGINT) AS steps,
    sum(expected_accepted) / sum(steps) AS mean_expected,
    1.0 * sum(accepted_tokens) / sum(steps) AS mean_accepted
FROM step_expectations
GROUP BY job_id, quarter
"""

# Step time without prefill, split into drafting, the target's forward pass, and host time.
_TIME_BY_JOB = """
CREATE VIEW time_by_job AS
SELECT
    job_id,
    sum(step_ms) / 1000.0 AS busy_s,
    sum(draft_ms) / NULLIF(sum(step_ms), 0) AS draft_share,
    sum(verify_ms) / NULLIF(sum(step_ms), 0) AS verify_share,
    (sum(step_ms) - sum(draft_ms) - sum(verify_ms)) / NULLIF(sum(step_ms), 0) AS host_share
FROM step_minutes
GROUP BY job_id
"""

_DECISIONS_BY_JOB = """
CREATE VIEW decisions_by_job AS
SELECT
    job_id,
    decision,
    CAST(sum(steps) AS BIGINT) AS steps,
    1.0 * sum(steps) / sum(sum(steps)) OVER (PARTITION BY job_id) AS share,
    1.0 * sum(tokens) / sum(steps) AS mean_emitted_per_step,
    sum(plain_ms) / NULLIF(sum(compared_ms), 0) AS speedup
FROM step_minutes
WHERE steps > 0
GROUP BY job_id, decision
"""

# By worker and hour, over the minutes with an energy reading. Empty where no device reports energy.
_TOKENS_PER_JOULE = """
CREATE VIEW tokens_per_joule AS
SELECT
    energy.worker_id AS worker_id,
    energy.minute - energy.minute % 3600 AS hour,
    CAST(sum(COALESCE(written.tokens, 0)) AS BIGINT) AS tokens,
    sum(energy.joules) AS joules,
    1.0 * sum(COALESCE(written.tokens, 0)) / NULLIF(sum(energy.joules), 0) AS tokens_per_joule
FROM worker_energy AS energy
LEFT JOIN (
    SELECT worker_id, minute, sum(tokens + first_tokens) AS tokens
    FROM step_minutes
    GROUP BY worker_id, minute
) AS written ON written.worker_id = energy.worker_id AND written.minute = energy.minute
GROUP BY energy.worker_id, energy.minute - energy.minute % 3600
"""

# Speed-up checks (storage.speedup_checks). The standard error is the square root of `speedup_variance`: SQLite may lack
# sqrt(). `faults`: texts that differ; `given_up`: requests with an error instead of times.
_JOB_COMPARISON = """
CREATE VIEW job_comparison AS
SELECT
    job_id,
    requests,
    compared,
    plain_ms / NULLIF(drafted_ms, 0) AS speedup,
    1.0 * compared / NULLIF(compared - 1, 0) * (
        plain_squared - 2.0 * plain_ms / NULLIF(drafted_ms, 0) * product
        + plain_ms * plain_ms / NULLIF(drafted_ms * drafted_ms, 0) * drafted_squared
    ) / NULLIF(drafted_ms * drafted_ms, 0) AS speedup_variance,
    mean_batch_sequences,
    faults,
    given_up
FROM (
    SELECT
        job_id,
        count(same_text) AS requests,
        count(drafted_ms) AS compared,
        sum(plain_ms) AS plain_ms,
        sum(drafted_ms) AS drafted_ms,
        sum(plain_ms * plain_ms) AS plain_squared,
        sum(drafted_ms * drafted_ms) AS drafted_squared,
        sum(plain_ms * drafted_ms) AS product,
        avg(batch_sequences) AS mean_batch_sequences,
        sum(CASE WHEN NOT same_text THEN 1 ELSE 0 END) AS faults,
        count(*) - count(same_text) AS given_up
    FROM comparisons
    GROUP BY job_id
) AS sums
"""

VIEWS: Final[Mapping[str, str]] = {
    "job_speedup": _JOB_SPEEDUP,
    "speedup_by_model": _SPEEDUP_BY_MODEL,
    "speedup_by_drafter": _SPEEDUP_BY_DRAFTER,
    "speedup_by_hour": _SPEEDUP_BY_HOUR,
    "throughput_by_minute": _THROUGHPUT_BY_MINUTE,
    "acceptance_by_depth": _ACCEPTANCE_BY_DEPTH,
    "acceptance_by_rank": _ACCEPTANCE_BY_RANK,
    "acceptance_histogram": _ACCEPTANCE_HISTOGRAM,
    "tree_by_batch": _TREE_BY_BATCH,
    "expected_and_accepted": _EXPECTED_AND_ACCEPTED,
    "reliability": _RELIABILITY,
    "time_by_job": _TIME_BY_JOB,
    "decisions_by_job": _DECISIONS_BY_JOB,
    "tokens_per_joule": _TOKENS_PER_JOULE,
    "job_comparison": _JOB_COMPARISON,
}


def create_views(connection: Connection, names: Iterable[str] = VIEWS) -> None:
    """Create these views. Their tables must exist."""
    for name in names:
        connection.execute(text(VIEWS[name].strip()))


def drop_views(connection: Connection) -> None:
    """Drop these views; those that do not exist are skipped."""
    for name in VIEWS:
        connection.execute(text(f"DROP VIEW IF EXISTS {name}"))
