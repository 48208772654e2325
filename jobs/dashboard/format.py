"""Numbers and times as a page writes them. Pure."""

from __future__ import annotations

import time

from storage.queries import JobView
from storage.statistics import SpeedupCheckStats

_NORMAL_95 = 1.96


def span(seconds: float) -> str:
    """Return a span of time in its two largest units."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, left = divmod(rest, 60)
    parts = [f"{count} {unit}" for count, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (left, "s")) if count]
    return " ".join(parts[:2]) or "0 s"


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """Return a number, or a dash where nothing was measured."""
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def percent(value: float | None) -> str:
    """Return a share."""
    return "–" if value is None else f"{value:.0%}"


def speedup(value: float | None, error: float | None = None) -> str:
    """Return a speed-up with the half width of its 95% interval."""
    if value is None:
        return "–"
    return f"{value:.2f}×" + ("" if error is None else f" ± {_NORMAL_95 * error:.2f}")


def compared(comparison: SpeedupCheckStats) -> str:
    """Return what stands beside a comparison with plain decoding: of how many requests, and what was wrong."""
    if not comparison.done:
        return f"{comparison.requests_asked:,d} requests wait for an idle worker"
    if comparison.error_code:
        return f"given up, {comparison.error_code}: {comparison.error_message}"
    if not comparison.requests:
        return "no request was decoded both ways"
    if comparison.faults:
        return f"{comparison.faults:,d} of {comparison.requests:,d} texts differ: a fault"
    return f"{comparison.requests:,d} requests decoded both ways, the same texts"


def ago(at: float) -> str:
    """Return how long ago something was."""
    return f"{span(time.time() - at)} ago"


def ended(job: JobView) -> int:
    """Return how many requests of a job have ended."""
    return job.requests_completed + job.requests_failed


def elapsed_s(job: JobView) -> float:
    """Return how long a job has been worked on."""
    return 0.0 if job.started_at is None else max(0.0, (job.finished_at or time.time()) - job.started_at)


def tokens_per_s(job: JobView) -> float | None:
    """Return the tokens per second of a job so far."""
    seconds = elapsed_s(job)
    return job.completion_tokens / seconds if seconds > 0 else None


def left(job: JobView) -> str:
    """Return the time a job will still take if it goes on like this; how long it took, once it has ended."""
    if job.finished_at is not None:
        return f"took {span(elapsed_s(job))}" if job.started_at else "never started"
    if job.started_at is None:
        return "waiting"
    done = ended(job)
    if not done:
        return f"{span(elapsed_s(job))} so far"
    return f"about {span(elapsed_s(job) / done * (job.requests_total - done))} left"
