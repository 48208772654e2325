"""Settings and database as in tests/unit/jobs, for laws of `jobs` that start a server or an interpreter."""

from __future__ import annotations

from tests.unit.jobs.conftest import _environment_of_its_own, database, settings

__all__ = ["_environment_of_its_own", "database", "settings"]
