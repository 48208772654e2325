"""The invariants of the database hold after any sequence of acts by workers, users and time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import text

from storage.cached_answers import CacheScope, Repeats, copy_answers
from storage.records import Checkpoint, Claim, RequestFailure, RequestProgress
from storage.session import Database
from tests.databases import make_empty, on_shared_sqlite
from tests.factories import a_request
from tests.unit.storage import acts
from tests.unit.storage.conftest import KINDS

WORKERS = st.sampled_from(["w1", "w2"])
JOBS = st.sampled_from(["a", "b"])
EMITTED = st.lists(st.integers(1, 4), min_size=1, max_size=3)


class TwoWorkers(RuleBasedStateMachine):
    """Two workers on two jobs, driven by hypothesis. A worker may write under a lease that it has lost."""

    def __init__(self, empty: Callable[[], Database]) -> None:
        super().__init__()
        self.database = empty()
        self.held: dict[str, list[Claim]] = {"w1": [], "w2": []}
        self.repeats = {worker: Repeats(CacheScope("scope", "fp_1")) for worker in self.held}
        self.written: dict[tuple[str, int], list[Checkpoint]] = {}  # checkpoints that each owner of a lease has sent
        self.ended: dict[Any, Any] = {}

    @initialize()
    def record(self) -> None:
        equal = [a_request(f"equal-{number}", identity="same") for number in range(3)]
        acts.record(self.database, "a", [*equal, a_request()])
        acts.record(self.database, "b", [equal[0], a_request()])

    @rule(worker=WORKERS, limit=st.integers(1, 3))
    def claim(self, worker: str, limit: int) -> None:
        holding = [claim.lease.key for claim in self.held[worker]]
        claims = acts.claim(self.database, worker, limit, holding=holding, repeats=self.repeats[worker])
        others = {claim.lease for held in self.held.values() for claim in held}
        assert others.isdisjoint(claim.lease for claim in claims)
        self.held[worker] += claims

    @rule(worker=WORKERS, emitted=EMITTED, ends=st.booleans(), twice=st.booleans())
    def write(self, worker: str, emitted: list[int], ends: bool, twice: bool) -> None:
        if not self.held[worker]:
            return
        claim = self.held[worker][0]
        before = self.written.setdefault((worker, id(claim)), list(claim.checkpoints))
        seq = before[-1].seq + 1 if before else 1
        before.append(acts.tokens_of(seq, *emitted, first=1))
        finished = (acts.end_of(*before),) if ends else ()
        sent = RequestProgress(claim.lease, (before[-1],), finished, ends=ends)
        for _ in range(1 + twice):
            leases = [c.lease for c in self.held[worker]]
            result = acts.flush(self.database, worker, sent, held=leases, numerics="fp_1")
        lost = result.lost | ({claim.lease.key} if ends else set())
        self.held[worker] = [c for c in self.held[worker] if c.lease.key not in lost]

    @rule(worker=WORKERS)
    def fail(self, worker: str) -> None:
        if self.held[worker]:
            lease = self.held[worker].pop(0).lease
            acts.flush(self.database, worker, RequestProgress(lease, failure=RequestFailure("invalid_value", "no")))

    @rule(worker=WORKERS)
    def copy(self, worker: str) -> None:
        repeats = self.repeats[worker]
        with self.database.write() as session:
            copy_answers(session, repeats.answered, repeats.scope)

    @rule(worker=WORKERS)
    def release(self, worker: str) -> None:
        if self.held[worker]:
            acts.release(self.database, worker, self.held[worker].pop().lease)

    @rule()
    def let_leases_lapse(self) -> None:
        with self.database.write() as session:
            session.execute(text("UPDATE requests SET lease_expires_at = 1.0 WHERE status = 'running'"))

    @rule(job_id=JOBS)
    def cancel(self, job_id: str) -> None:
        acts.cancel(self.database, job_id)

    @rule(job_id=JOBS)
    def let_the_window_pass(self, job_id: str) -> None:
        with self.database.write() as session:
            session.execute(text("UPDATE jobs SET expires_at = 1.0 WHERE id = :id"), {"id": job_id})

    @rule()
    def expire(self) -> None:
        acts.expire(self.database)

    @invariant()
    def laws_hold(self) -> None:
        acts.check_laws(self.database)

    @invariant()
    def what_has_ended_stays_as_it_is(self) -> None:
        for job_id in ("a", "b"):
            for index, row in acts.requests_of(self.database, job_id).items():
                if row.finished_at is not None:
                    assert self.ended.setdefault((job_id, index), row) == row


@pytest.mark.parametrize("kind", KINDS)
def test_the_laws_hold_after_every_act(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    paths = (tmp_path / str(number) for number in count())
    opened = ExitStack()

    def empty() -> Database:
        if kind == "sqlite":
            opened.close()
            return opened.enter_context(on_shared_sqlite(next(paths)))
        database: Database = request.getfixturevalue("postgresql")
        make_empty(database.engine)
        return database

    with opened:
        run_state_machine_as_test(lambda: TwoWorkers(empty), settings=SETTINGS)  # type: ignore[arg-type]


SETTINGS = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking on a real database takes minutes
    suppress_health_check=list(HealthCheck),
)
