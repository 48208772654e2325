"""What the planner has learned about a drafter. It outlives the engine: the next one with this drafter continues."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Final, Self

from worker.engine.speculation.acceptance_model import AcceptanceModel
from worker.engine.speculation.cost_model import PlainStepTimes
from worker.engine.speculation.draft_costs import DraftCosts, DraftTimes
from worker.engine.speculation.regret_guard import RegretGuard

RECORD_VERSION: Final = 3  # of what `record` returns; raise it with any change of what is stored or of its meaning


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

    def record(self) -> dict[str, Any]:
        """Return all that holds for later processes as JSON, for `restored`: not what is true of this moment only.

        Times of plain steps are left out: the machine's load changes them.
        """
        strategies = {"whole": self.whole, "free": self.forward_free}
        return {
            "v": RECORD_VERSION,
            "acceptance": self.acceptance.record(),
            "guards": {name: stats.guard.record() for name, stats in strategies.items()},
            "costs": {name: stats.costs.record() for name, stats in strategies.items()},
        }

    def restored(self, record: Mapping[str, Any]) -> Self:
        """Return this state with what an earlier process `record`ed.

        Return it as it is if the record is of another version or damaged: then the process learns everything again.
        """
        if record.get("v") != RECORD_VERSION:
            return self
        state = deepcopy(self)
        try:
            state.acceptance.restore(record["acceptance"])
            for name, stats in (("whole", state.whole), ("free", state.forward_free)):
                stats.guard.restore(record["guards"][name])
                stats.costs.restore(record["costs"][name])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return self
        return state

    def as_json(self) -> dict[str, Any]:
        """Return the state for `workers.calibration`."""
        buckets = {"whole": self.whole.guard.as_json(), "free": self.forward_free.guard.as_json()}
        times = {"whole": self.whole.costs.as_json(), "free": self.forward_free.costs.as_json()}
        return {"acceptance": self.acceptance.as_json(), "accounts": buckets, "drafts": times}
