"""Experience: everything that is learned about a drafter while it drafts. It outlives the engine that learned it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from worker.engine.speculation.acceptance_model import Acceptance
from worker.engine.speculation.draft_costs import DraftCosts, DraftTimes
from worker.engine.speculation.plain_step_time import Pace
from worker.engine.speculation.regret_guard import Governor


@dataclass(frozen=True, slots=True)
class Ledger:
    """What one way of drafting costs and earns."""

    drafts: DraftCosts = field(default_factory=DraftCosts)
    governor: Governor = field(default_factory=Governor)


@dataclass(slots=True)
class Experience:
    """What one drafter with one target has been worth so far: all of it, and the part that runs no network."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    whole: Ledger = field(default_factory=Ledger)
    free: Ledger = field(default_factory=Ledger)
    steps: int = 0  # that might have had drafts
    probed: int = 0  # which of them was the last that was plain on purpose
    pace: Pace = field(default_factory=Pace)

    @classmethod
    def of(cls, whole: DraftTimes, free: DraftTimes | None) -> Self:
        """Return what is known at the start of a drafter, and of its part that runs no network: what they cost."""
        return cls(whole=Ledger(DraftCosts(whole)), free=Ledger(DraftCosts(free)))

    def as_json(self) -> dict[str, Any]:
        """Return it for `workers.calibration`."""
        accounts = {"whole": self.whole.governor.as_json(), "free": self.free.governor.as_json()}
        times = {"whole": self.whole.drafts.as_json(), "free": self.free.drafts.as_json()}
        return {"acceptance": self.acceptance.as_json(), "accounts": accounts, "drafts": times}
