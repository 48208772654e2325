"""Laws of stored speculation states: one row a kind of device, target and draft, and the newest one counts."""

from __future__ import annotations

from dataclasses import replace

from storage import speculation_states
from storage.session import Database
from storage.speculation_states import DraftIdentity

KIND = DraftIdentity("a" * 32, "cpu (2 threads)", "smollm2", "head")


def test_the_newest_state_of_a_kind_is_read_and_no_other(database: Database) -> None:
    with database.write() as session:
        speculation_states.write(session, KIND, {"v": 1})
        speculation_states.write(session, replace(KIND, key="b" * 32, draft=None), {"v": 2})
        speculation_states.write(session, KIND, {"v": 3})
    with database.read() as session:
        assert speculation_states.read(session, KIND) == {"v": 3}
        assert speculation_states.read(session, replace(KIND, key="b" * 32)) == {"v": 2}
        assert speculation_states.read(session, replace(KIND, key="c" * 32)) is None
