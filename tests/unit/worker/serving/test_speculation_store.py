"""Laws of the stored speculation state: a later process continues from it, and starts without it if it must."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import delete

from storage.models import SpeculationStateRow
from storage.session import Database
from storage.speculation_states import DraftIdentity
from worker.engine.speculation.state import SpeculationState
from worker.serving.speculation_store import SpeculationStore

KIND = DraftIdentity("a" * 32, "cpu (2 threads)", "smollm2", "head")


def learned(steps: int) -> SpeculationState:
    """Return a state after some steps."""
    state = SpeculationState(steps=steps)
    for _ in range(steps):
        state.whole.guard.observe(1, 3, 11.0, 10.0, speculated=True)
    return state


def test_a_later_process_continues_from_what_was_stored(database: Database) -> None:
    store, state = SpeculationStore(database, KIND), learned(30)
    store.snapshot(state, now=True)
    store.write()
    later = SpeculationStore(database, KIND).read(SpeculationState())
    assert later.record() == state.record()


def test_a_state_without_new_steps_is_not_written_again(database: Database) -> None:
    store, state = SpeculationStore(database, KIND), learned(30)
    store.snapshot(state, now=True)
    store.write()
    with database.write() as session:
        session.execute(delete(SpeculationStateRow))
    store.snapshot(state, now=True)
    store.write()
    assert store.read(SpeculationState()).record() == SpeculationState().record()


def test_a_worker_starts_without_what_was_learned_if_the_database_is_away(tmp_path: Path) -> None:
    away = Database.open(f"sqlite:///{tmp_path}/none/none.db")
    assert SpeculationStore(away, KIND).read(SpeculationState()).record() == SpeculationState().record()
