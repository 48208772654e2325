"""Experience: everything that is learned about a drafter while it drafts. It outlives the engine that learned it.

[experience] -> planner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from worker.engine.acceptance import Acceptance
from worker.engine.budget import DraftCosts
from worker.engine.governor import Governor


@dataclass(frozen=True, slots=True)
class Experience:
    """What one drafter with one target has been worth so far."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    drafts: DraftCosts = field(default_factory=DraftCosts)
    governor: Governor = field(default_factory=Governor)

    def as_json(self) -> dict[str, Any]:
        """Return it for `workers.calibration`."""
        return {"acceptance": self.acceptance.as_json(), "accounts": self.governor.as_json()}
