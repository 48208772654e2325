"""Format numbers and times for the dashboard, and read numbers from its inputs."""

from __future__ import annotations

import time

from jobs.reports.progress import elapsed_s, time_left_s
from jobs.reports.speedup import speedup_text
from storage.priorities import Priority, priority_of
from storage.queries import JobView


def span(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, left = divmod(rest, 60)
    parts = [f"{count} {unit}" for count, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (left, "s")) if count]
    return " ".join(parts[:2]) or "0 s"


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """Return a number, or a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def percent(value: float | None) -> str:
    """Return a fraction as a percentage, or a dash for None."""
    return "–" if value is None else f"{value:.0%}"


def speedup(value: float | None, standard_error: float | None = None) -> str:
    """Return a speed-up with its 95% interval, or a dash."""
    return speedup_text(value, standard_error, missing="–")


def ago(at: float) -> str:
    """Return the time since `at` (Unix time), such as `3 min ago`."""
    return f"{span(time.time() - at)} ago"


def ended(job: JobView) -> int:
    """Return the number of ended requests of a job."""
    return job.requests_completed + job.requests_failed


def tokens_per_s(job: JobView) -> float | None:
    """Return the mean tokens per second of a job so far, without copied answers."""
    seconds = elapsed_s(job)
    return job.computed_completion_tokens / seconds if seconds > 0 else None


def left(job: JobView) -> str:
    """Return the estimated time left of a running job, the time so far of a paused or the duration of an ended one."""
    if job.finished_at is not None:
        return f"took {span(elapsed_s(job))}" if job.started_at else "never started"
    if job.started_at is None:
        return "waiting"
    left_s = None if job.paused_at is not None else time_left_s(job)
    return f"{span(elapsed_s(job))} so far" if left_s is None else f"about {span(left_s)} left"


def priority(job: JobView) -> list[str]:
    """Return the priority class of a job in words; nothing for the normal one."""
    known = priority_of(job.priority_class)
    return [] if known is Priority.NORMAL else [f"{known} priority"]


def whole(value: float | None) -> int | None:
    """Return the value of a number input as a whole number; None if the input is empty."""
    return None if value is None else int(value)
