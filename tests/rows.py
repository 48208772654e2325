"""`python -m tests.rows --rows 20000000 --database postgresql`: measure a database of many step rows; print JSON.

Fill an empty database with jobs whose steps have random trees, through the functions of a worker's flush, and time the
writes. Then time queries (views, statistics, pages of the dashboard), and pruning half of the steps. The servers are
temporary, with durable commits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from storage import job_details, queries, rollups, views
from storage import statistics as figures
from storage.dialect import insert_many
from storage.models import (
    ChoiceOutput,
    DecodeStep,
    JobRow,
    PackedSteps,
    Request,
    StepBatchSize,
    StepDepth,
    StepExpectation,
    StepMinute,
)
from storage.prune import prune_steps
from storage.records import Checkpoint, Claim, RequestProgress, StepRow
from storage.session import Database, write_connection
from storage.steps.columns import StepColumns
from storage.steps.packing import packed_rows
from tests.databases import on_postgresql, on_sqlite
from tests.factories import a_finished_choice, a_step
from tests.load import size, timed
from tests.postgres import Postgres
from tests.unit.storage.acts import claim, flush, record

STEPS = 100  # of a request
REQUESTS = 2_000  # of a job
AT_ONCE = 200  # requests whose rows are one transaction
JOB_S, GAP_S = 1_800.0, 3_600.0  # duration of a job; from the start of one job to the next
KINDS = 64  # of random requests
FLUSHED, STEPS_A_FLUSH = 64, 10  # requests that are decoded together, and their steps between two flushes
WORKER = "worker-" + "7" * 32  # as long as real ids, which are in every row
ASKED = 5  # runs of each query; slow queries run once
LONG_S = 2.0
SUMS = (StepMinute, StepBatchSize, StepDepth, StepExpectation)
# The numbers of the view job_speedup, computed from all steps.
OF_ALL_STEPS = """
    SELECT job_id, count(*), sum(emitted_tokens), 1000.0 * sum(emitted_tokens) / sum(step_ms / batch_sequences),
        sum(emitted_tokens * plain_step_ms / batch_sequences) / sum(step_ms / batch_sequences)
    FROM decode_steps WHERE plain_step_ms IS NOT NULL GROUP BY job_id
"""

Row = dict[str, Any]


class Steps:
    """Random steps of requests, the same in every run."""

    def __init__(self) -> None:
        """Create a few random requests; all others repeat them."""
        dice = random.Random(1)
        self._kinds = [_kind(dice, batch=dice.choice((1, 2, 4, 8, 16, 32, 64))) for _ in range(KINDS)]

    def of(self, index: int, began_at: float) -> StepColumns:
        """Return the steps of one request, which began at `began_at`."""
        kind = self._kinds[index % KINDS]
        began_ms = int(began_at * 1e3)
        return replace(kind, ended_ms=[began_ms + ended_ms for ended_ms in kind.ended_ms])


def _kind(dice: random.Random, batch: int) -> StepColumns:
    return StepColumns.of(_step(dice, number, batch) for number in range(STEPS))


def _step(dice: random.Random, number: int, batch: int) -> StepRow:
    nodes = dice.randint(0, 12) if number else 0
    accepted = min(nodes, dice.choice((0, 0, 0, 1, 1, 2, 3)))
    reached = (*((dice.randint(1, 3), 0) for _ in range(accepted)), (dice.randint(1, 3), None))
    return a_step(
        step=number,
        tree_nodes=nodes,
        tree_depth=max(accepted, min(nodes, dice.randint(1, 5))),
        accepted_tokens=accepted,
        emitted_tokens=accepted + 1,
        expected_accepted=accepted + dice.random() if nodes else None,
        draft_ms=1.0 + dice.random() / 4,
        verify_ms=8.0 + dice.random(),
        step_ms=10.0 + dice.random(),
        batch_sequences=batch,
        drafter=dice.choice(("suffix", "head+suffix")) if nodes else None,
        plain_step_ms=9.0 + dice.random() / 4 if number else None,
        decision="tree" if nodes else "nothing",
        ended_at=0.0105 * number,
        reached=reached if nodes else None,
    )


def fill(database: Database, steps: Steps, rows: int) -> dict[str, float]:
    """Write `rows` step rows, of jobs that ended one after the other."""
    jobs = max(2, rows // (REQUESTS * STEPS))
    before, steps_s, rollups_s = size(database), 0.0, 0.0
    started = time.perf_counter()
    for number in range(jobs):
        job_id, began_at = f"batch_{number:032d}", time.time() - GAP_S * (jobs - number)
        record(database, job_id, requests=REQUESTS)
        for first in range(0, REQUESTS, AT_ONCE):
            took = _end_requests(database, steps, job_id, range(first, first + AT_ONCE), began_at)
            steps_s, rollups_s = steps_s + took[0], rollups_s + took[1]
        _end(database, job_id, began_at)
    written = jobs * REQUESTS * STEPS
    return {
        "rows": written,
        "bytes_per_step": (size(database) - before) / written,
        "step_rows_per_s": written / steps_s,
        "rollups_s_per_million_rows": rollups_s / written * 1e6,
        "filled_in_s": time.perf_counter() - started,
    }


def _end_requests(
    database: Database, steps: Steps, job_id: str, indexes: range, began_at: float
) -> tuple[float, float]:
    """Write outputs and steps of requests in one transaction; return the seconds of the steps, and of their sums."""
    choices = {index: steps.of(index, began_at + JOB_S * index / REQUESTS) for index in indexes}
    with database.write() as session:
        insert_many(session, ChoiceOutput, [_output(job_id, index, began_at) for index in indexes])
        began = time.perf_counter()
        key = {"job_id": job_id, "choice_index": 0}
        insert_many(
            session,
            PackedSteps,
            [
                row
                for index in indexes
                for row in packed_rows(key | {"request_index": index}, WORKER, choices[index], 0)
            ],
        )
        written = time.perf_counter()
        rollups.add_steps(session, [(job_id, [(WORKER, choices[index])]) for index in indexes])
        return written - began, time.perf_counter() - written


def _output(job_id: str, index: int, began_at: float) -> Row:
    choice = asdict(a_finished_choice("Hi " * STEPS, started_at=began_at, finished_at=began_at + JOB_S))
    own = {"job_id": job_id, "request_index": index, "accepted_tokens": 0, "pieces": [], "logprobs": None}
    return {**choice, **own, "worker_id": WORKER, "event_number": 1, "checkpoints": []}


def _end(database: Database, job_id: str, began_at: float) -> None:
    ended = {"status": "completed", "started_at": began_at, "finished_at": began_at + JOB_S}
    with database.write() as session:
        session.execute(update(Request).where(Request.job_id == job_id).values(**ended))
        session.execute(update(JobRow).where(JobRow.id == job_id).values(**ended, requests_completed=REQUESTS))


def flushing(database: Database, steps: Steps) -> dict[str, float]:
    """Return the costs of whole flushes; those of a first job, which compile the statements, do not count."""
    _flush_job(database, steps, "batch_" + "8" * 32)
    return _flush_job(database, steps, "batch_" + "9" * 32)


def _flush_job(database: Database, steps: Steps, job_id: str) -> dict[str, float]:
    """Decode requests whose steps are committed `STEPS_A_FLUSH` at a time; return the costs of all flushes together."""
    record(database, job_id, requests=FLUSHED)
    claims = claim(database, WORKER, FLUSHED)
    given = [_progress(claimed, steps.of(index, time.time())) for index, claimed in enumerate(claims)]
    started, cpu_started = time.perf_counter(), time.process_time()
    for progress in zip(*given, strict=True):
        flush(database, WORKER, *progress, held=[claimed.lease for claimed in claims])
    written, cpu_s = FLUSHED * STEPS, time.process_time() - cpu_started
    return {
        "steps_per_s": written / (time.perf_counter() - started),
        "cpu_us_per_step": cpu_s / written * 1e6,
        "cpu_us_per_sequence_and_flush": cpu_s / written * 1e6 * STEPS_A_FLUSH,
    }


def _progress(claimed: Claim, steps: StepColumns) -> list[RequestProgress]:
    """Return what the flushes of a request write; the last one ends it."""
    parts = [steps.part(first, first + STEPS_A_FLUSH) for first in range(0, STEPS, STEPS_A_FLUSH)]
    checkpoints = [_checkpoint(seq, part) for seq, part in enumerate(parts)]
    ids = tuple(token for checkpoint in checkpoints for token in checkpoint.token_ids)
    choice = a_finished_choice("Hi " * len(ids), token_ids=ids, completion_tokens=len(ids), last_seq=len(parts))
    progress = [RequestProgress(claimed.lease, checkpoints=(checkpoint,)) for checkpoint in checkpoints]
    progress[-1] = replace(progress[-1], finished=(choice,), ends=True)
    return progress


def _checkpoint(seq: int, steps: StepColumns) -> Checkpoint:
    accepted = [place < count - 1 for count in steps.emitted_tokens for place in range(count)]
    pieces = tuple(("Hi ", "draft" if draft else "target") for draft in accepted)
    text = "Hi " * len(accepted)
    return Checkpoint(0, seq, tuple(range(5000, 5000 + len(accepted))), tuple(accepted), text, pieces, steps)


def questions() -> dict[str, Callable[[Session], Any]]:
    """Return the timed queries, by their names in the report."""
    job_id = f"batch_{1:032d}"
    steps = select(DecodeStep.step, DecodeStep.tree_nodes).where(
        DecodeStep.job_id == job_id, DecodeStep.request_index == 7
    )
    return {
        **{name: _all_of(name) for name in views.VIEWS},
        "the numbers of job_speedup, of all steps": lambda session: session.execute(text(OF_ALL_STEPS)).all(),
        "statistics of one job": lambda session: figures.job_stats(session, job_id),
        "statistics of everything": lambda session: figures.total_stats(session),
        "100 jobs with their numbers": lambda session: figures.job_summaries(session, 100),
        "the newest 25 jobs": lambda session: queries.jobs(session, 25),
        "21 requests with texts": lambda session: job_details.requests(session, job_id, limit=21),
        "21 failed requests": lambda session: job_details.requests(session, job_id, ("failed",), limit=21),
        "steps of one request": lambda session: session.execute(steps).all(),
    }


def _all_of(view: str) -> Callable[[Session], Any]:
    return lambda session: session.execute(text(f"SELECT * FROM {view}")).all()


def asking(database: Database) -> dict[str, float]:
    """Return the median time of every query in ms; of slow ones, the first time."""
    return {name: round(_ask(database, question), 1) for name, question in questions().items()}


def _ask(database: Database, question: Callable[[Session], Any]) -> float:
    took: list[float] = []
    while len(took) < ASKED and (not took or took[0] < LONG_S):
        with database.read() as session:
            took.append(timed(lambda: question(session)))  # called in this iteration
    return statistics.median(took) * 1e3


def pruning(database: Database) -> dict[str, float]:
    """Delete the steps of the older half of the jobs."""
    with database.read() as session:
        ends = session.scalars(
            select(JobRow.finished_at).where(JobRow.finished_at.is_not(None)).order_by(JobRow.id)
        ).all()
    older_than_s = time.time() - float(ends[len(ends) // 2] or 0) + 1
    started = time.perf_counter()
    rows = sum(prune_steps(database, older_than_s))
    return {"rows": rows, "s": time.perf_counter() - started}


def measure(database: Database, rows: int) -> dict[str, Any]:
    """Fill an empty database, query it and prune it; return all times."""
    steps = Steps()
    with write_connection(database.engine) as connection:
        views.drop_views(connection)
        views.create_views(connection)
    said: dict[str, Any] = {"flushing": flushing(database, steps), "filling": fill(database, steps, rows)}
    with write_connection(database.engine) as connection:
        connection.execute(text("ANALYZE"))
    with database.read() as session:
        said["sums"] = {m.__tablename__: session.scalar(select(func.count()).select_from(m)) for m in SUMS}
    return said | {"ms": asking(database), "pruning": pruning(database)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    asked = parser.parse_args()
    said: dict[str, Any] = {"database": asked.database, "cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
    with ExitStack() as cleanup:
        if asked.database == "sqlite":
            folder = cleanup.enter_context(tempfile.TemporaryDirectory())
            database = cleanup.enter_context(on_sqlite(Path(folder)))
        else:
            server = Postgres(shared_buffers="1GB", max_wal_size="4GB")
            cleanup.callback(server.remove)
            server.start()
            database = cleanup.enter_context(on_postgresql(server.create("rows"), statement_timeout_s=None))
        said |= measure(database, asked.rows)
    said["load_after"] = os.getloadavg()[0]
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
