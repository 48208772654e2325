"""Sources of draft tokens behind one interface, `worker.engine.drafting.Drafter`."""

from __future__ import annotations
