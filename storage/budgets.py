"""Budgets: a job that has spent its tokens or its time pauses; what it has committed stays.

Tokens are those of its prompts and completions, as its status shows them, without those that were copied from the
cache. Time is that since its start, without pauses.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, func, or_, select, update
from sqlalchemy.orm import Session

from storage.models import JobRow

BY_TOKENS: Final = "budget_tokens"  # reasons of a pause
BY_SECONDS: Final = "budget_seconds"


def pause_spent(session: Session, job_ids: Collection[str], now: float) -> None:
    """Pause those of the jobs that have spent a budget. The next flush returns their running requests to the queue."""
    session.execute(
        update(JobRow)
        .where(JobRow.id.in_(job_ids), JobRow.status == "in_progress", JobRow.paused_at.is_(None), _is_spent(now))
        .values(paused_at=now, pause_reason=case((_tokens_are_spent(), BY_TOKENS), else_=BY_SECONDS))
    )


def spent_budget(session: Session, job_id: str, now: float) -> str | None:
    """Return the reason for which a job would pause at once; None if its budgets last."""
    reason: Any = case((_tokens_are_spent(), BY_TOKENS), else_=BY_SECONDS)
    return session.scalar(select(reason).where(JobRow.id == job_id, _is_spent(now)))


def _is_spent(now: float) -> ColumnElement[bool]:
    until = func.coalesce(JobRow.paused_at, now)
    return or_(_tokens_are_spent(), until - JobRow.started_at - JobRow.paused_s >= JobRow.budget_s)


def _tokens_are_spent() -> ColumnElement[bool]:
    cached = JobRow.cached_prompt_tokens + JobRow.cached_completion_tokens
    spent = JobRow.prompt_tokens + JobRow.completion_tokens - cached >= JobRow.budget_tokens
    return and_(JobRow.budget_tokens.is_not(None), spent)
