"""What the planner has learned about a drafter. It outlives the engine: the next one with this drafter continues."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from worker.engine.speculation.acceptance_model import AcceptanceModel
from worker.engine.speculation.cost_model import PlainStepTimes
from worker.engine.speculation.draft_costs import DraftCosts, DraftTimes
from worker.engine.speculation.regret_guard import RegretGuard


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """What one drafting strategy costs and gains."""

    costs: DraftCosts = field(default_factory=DraftCosts)
    guard: RegretGuard = field(default_factory=RegretGuard)


@dataclass(slots=True)
class SpeculationState:
    """Everything learned about one drafter with one target: as a whole, and of its part that runs no forward."""

    acceptance: AcceptanceModel = field(default_factory=AcceptanceModel)
    whole: DrafterStats = field(default_factory=DrafterStats)
    forward_free: DrafterStats = field(default_factory=DrafterStats)
    plain_steps: PlainStepTimes = field(default_factory=PlainStepTimes)
    steps: int = 0  # steps in which speculation was possible
    last_probe: int = 0  # value of `steps` at the last probe, a step that was plain on purpose

    @classmethod
    def of(cls, whole: DraftTimes, forward_free: DraftTimes | None) -> Self:
        """Return the state before the first step: calibrated times, and nothing learned."""
        return cls(whole=DrafterStats(DraftCosts(whole)), forward_free=DrafterStats(DraftCosts(forward_free)))

    def as_json(self) -> dict[str, Any]:
        """Return the state for `workers.calibration`."""
        buckets = {"whole": self.whole.guard.as_json(), "free": self.forward_free.guard.as_json()}
        times = {"whole": self.whole.costs.as_json(), "free": self.forward_free.costs.as_json()}
        return {"acceptance": self.acceptance.as_json(), "accounts": buckets, "drafts": times}
