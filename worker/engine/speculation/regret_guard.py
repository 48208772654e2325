"""The governor: may this step speculate? It watches what speculation really earned, whatever the model predicts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from worker.engine.speculation.cost_model import load_class

_ALLOWANCE = 0.003  # of all tokens may be lost by a way of drafting that does not pay; there are two at most
_START = 4.0  # tokens of a new account, and what any holds at most: to find out what drafts are worth
_PURSE = 0.5  # tokens per sequence that it holds at most, if that is more: old luck must not pay for long losses
_BACK = 0.5  # tokens that an overdrawn account must hold again
_RATE_WEIGHT = 0.05  # of a step in the running rate
_OUTLIER = 2.5  # a step's time counts as at most so many times what such a step usually takes


class Decision(StrEnum):
    """What a step did, and why."""

    TREE = "tree"  # some sequence showed draft nodes
    OFF = "off"  # the mode is plain
    PROBE = "probe"  # plain on purpose, to keep the comparison honest
    GUARD = "guard"  # speculation has not paid lately
    UNPROFITABLE = "unprofitable"  # drafts were grown, and none was worth a row
    NO_CANDIDATES = "nothing"  # the drafter offered nothing
    DRAFT_LAGGING = "behind"  # the drafter would have to read more than its drafts are likely to earn
    PREFILL = "prefill"  # no sequence was decoding


@dataclass(slots=True)
class _Account:
    credit: float = _START  # tokens
    overdrawn: bool = False
    rate: float = 0.0  # tokens per millisecond, as served
    speedup: float = 1.0  # of steps as served over plain ones
    steps: int = 0
    gain: float = 0.0  # of a step that speculated over a plain one, in parts of it
    tries: int = 0  # steps that speculated
    usual: float = 1.0  # plain steps that one of them takes

    def plain_steps(self, step_ms: float, plain_ms: float, speculated: bool) -> float:
        """Return how many plain steps a step took.

        A moment that the machine was away must not pass for a loss, and drafts that are dear every time must.
        """
        steps = min(step_ms / plain_ms, _OUTLIER * max(1.0, self.usual if speculated else 1.0))
        if speculated:
            self.tries += 1
            self.usual += max(_RATE_WEIGHT, 1 / self.tries) * (steps - self.usual)
        return steps


class RegretGuard:
    """Accounts of speculation by load class."""

    def __init__(self) -> None:
        """Start without accounts."""
        self._accounts: dict[int, _Account] = {}

    def _account(self, sequences: int) -> _Account:
        """Return the account of a load, a new one if there is none.

        What did not pay for fewer sequences hardly pays for more, whose rows are dearer: little may be spent on it.
        """
        load = load_class(sequences)
        if load not in self._accounts:
            fewer = [known for known in self._accounts if known < load and self._accounts[known].tries]
            lost = bool(fewer) and self._accounts[max(fewer)].gain < 0
            self._accounts[load] = _Account(credit=_BACK if lost else _START)
        return self._accounts[load]

    def overdrawn(self, sequences: int) -> bool:
        """Return whether the next step, of so many decoding sequences, must do without these drafts."""
        return self._account(sequences).overdrawn

    def rate(self, sequences: int, plain_ms: float) -> float:
        """Return the tokens per millisecond that are the price of time: those of plain decoding, or as much better as
        steps of this load have been, whatever their number of sequences."""
        return sequences / plain_ms * max(self._account(sequences).speedup, 1.0)

    def served(self, sequences: int) -> float:
        """Return the tokens per millisecond of steps that were served, of whatever kind; 0 before the first."""
        return self._account(sequences).rate

    def credit(self, sequences: int) -> float:
        """Return the tokens that may be spent on trying drafts."""
        return self._account(sequences).credit

    def gain(self, sequences: int) -> float:
        """Return what steps that speculated have lately gained over plain ones, in parts of a plain step."""
        return self._account(sequences).gain

    def settle(self, sequences: int, tokens: int, step_ms: float, plain_ms: float, *, speculated: bool) -> None:
        """Book a served step; `speculated` if it spent more than a glance on drafts, verified or not."""
        account = self._account(sequences)
        plain_steps = account.plain_steps(step_ms, plain_ms, speculated)
        account.steps += 1
        weight = max(_RATE_WEIGHT, 1 / account.steps)
        account.rate += weight * (tokens / (plain_steps * plain_ms) - account.rate)
        account.speedup += weight * (tokens / (sequences * plain_steps) - account.speedup)
        earned = tokens - sequences * plain_steps  # of a plain step nothing
        account.credit = min(account.credit + earned + _ALLOWANCE * tokens, max(_START, _PURSE * sequences))
        if speculated:
            account.gain += max(_RATE_WEIGHT, 1 / account.tries) * (earned / sequences - account.gain)
            if account.gain >= 0.0:
                account.credit = max(account.credit, 0.0)
        account.overdrawn = account.credit < (_BACK if account.overdrawn else 0.0)

    def rest(self, sequences: int, tokens: int) -> None:
        """Book a step that other drafts had."""
        account = self._account(sequences)
        account.credit = min(account.credit + _ALLOWANCE * tokens, max(_START, _PURSE * sequences))
        account.overdrawn = account.overdrawn and account.credit < _BACK

    def as_json(self) -> dict[str, Any]:
        """Return the accounts, by the largest batch of each load class."""
        return {
            str(2**key): {
                "credit_tokens": round(account.credit, 2),
                "overdrawn": account.overdrawn,
                "tokens_per_s": round(account.rate * 1e3, 2),
                "steps": account.steps,
            }
            for key, account in sorted(self._accounts.items())
        }
