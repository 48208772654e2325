"""Check the budget of a job: tokens and seconds after which it pauses (storage.budgets)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from jobs.errors import InvalidValue
from jobs.submission.values import refuse_unknown, shown

_COLUMNS: Final = {"tokens": "budget_tokens", "seconds": "budget_s"}


def budget_columns(budget: Any) -> dict[str, int | float | None]:
    """Return the columns of a budget; null removes one, without `budget` all. Raise InvalidValue."""
    if budget is None:
        return {"budget_tokens": None, "budget_s": None}
    if not isinstance(budget, Mapping) or not budget:
        raise InvalidValue("must be an object with tokens or seconds, or both", param="budget")
    refuse_unknown(budget, _COLUMNS.keys(), "budget.")
    tokens, seconds = budget.get("tokens"), budget.get("seconds")
    if tokens is not None and (type(tokens) is not int or not 1 <= tokens < 2**63):
        raise InvalidValue(f"must be a whole number above 0, not {shown(tokens)}", param="budget.tokens")
    if seconds is not None and (type(seconds) not in (int, float) or not 0 < seconds < float("inf")):
        raise InvalidValue(f"must be a number of seconds above 0, not {shown(seconds)}", param="budget.seconds")
    given = {"budget_tokens": tokens, "budget_s": None if seconds is None else float(seconds)}
    return {column: given[column] for name, column in _COLUMNS.items() if name in budget}
