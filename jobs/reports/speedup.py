"""The speed-up over plain decoding in words, the same on the page, in the terminal and in the report."""

from __future__ import annotations

from typing import Final

_NORMAL_95: Final = 1.96  # half width of the 95% interval, in standard errors


def speedup_text(speedup: float | None, standard_error: float | None = None, missing: str = "not measured") -> str:
    """Return a speed-up with its 95% interval."""
    if speedup is None:
        return missing
    return f"{speedup:.2f}x" + ("" if standard_error is None else f" ± {_NORMAL_95 * standard_error:.2f}")


def basis_text(speedup: float | None, plain_check: float | None, plain_steps: int) -> str:
    """Return how the plain time behind a speed-up is known: from calibration alone, or checked by plain steps."""
    if speedup is None or plain_check is None:
        return "by the calibrated time of plain steps; no plain step checked it"
    return f"by {plain_steps:,d} plain steps of these jobs: {speedup_text(speedup * plain_check)}"


def check_text(
    *,
    requests_asked: int,
    requests: int,
    done: bool,
    faults: int,
    error_code: str | None,
    error_message: str | None,
    mean_batch_sequences: float | None,
) -> str:
    """Return the state of a speed-up check, which decodes requests of a job with and without drafts."""
    if not done:
        return f"{requests_asked:,d} requests wait for an idle worker"
    if error_code:
        return f"given up, {error_code}: {error_message}"
    if not requests:
        return "no request was decoded with and without drafts"
    batch = "" if mean_batch_sequences is None else f", {mean_batch_sequences:.1f} at a time"
    if faults:
        return f"{faults:,d} of {requests:,d} texts differ, which is a fault{batch}"
    return f"{requests:,d} requests decoded with and without drafts, the same texts{batch}"
