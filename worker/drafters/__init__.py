"""Sources of draft tokens behind one interface, `worker.engine.speculation.drafting.Drafter`."""

from __future__ import annotations
