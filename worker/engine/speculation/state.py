"""Everything that is learned about a drafter while it drafts. It outlives the engine that learned it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from worker.engine.speculation.acceptance_model import AcceptanceModel
from worker.engine.speculation.draft_costs import DraftCosts, DraftTimes
from worker.engine.speculation.plain_step_time import PlainStepTimes
from worker.engine.speculation.regret_guard import RegretGuard


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """What one way of drafting costs and earns."""

    drafts: DraftCosts = field(default_factory=DraftCosts)
    governor: RegretGuard = field(default_factory=RegretGuard)


@dataclass(slots=True)
class SpeculationState:
    """What one drafter with one target has been worth so far: all of it, and the part that runs no network."""

    acceptance: AcceptanceModel = field(default_factory=AcceptanceModel)
    whole: DrafterStats = field(default_factory=DrafterStats)
    free: DrafterStats = field(default_factory=DrafterStats)
    steps: int = 0  # that might have had drafts
    probed: int = 0  # which of them was the last that was plain on purpose
    pace: PlainStepTimes = field(default_factory=PlainStepTimes)

    @classmethod
    def of(cls, whole: DraftTimes, free: DraftTimes | None) -> Self:
        """Return what is known at the start of a drafter, and of its part that runs no network: what they cost."""
        return cls(whole=DrafterStats(DraftCosts(whole)), free=DrafterStats(DraftCosts(free)))

    def as_json(self) -> dict[str, Any]:
        """Return it for `workers.calibration`."""
        accounts = {"whole": self.whole.governor.as_json(), "free": self.free.governor.as_json()}
        times = {"whole": self.whole.drafts.as_json(), "free": self.free.drafts.as_json()}
        return {"acceptance": self.acceptance.as_json(), "accounts": accounts, "drafts": times}
