"""Values for tests: every field has a default, and a test sets those it is about."""

from __future__ import annotations

from typing import Any

from jobs.keys import KeyLimits, Scope, new_key
from storage import keys
from storage.records import Checkpoint, FinishedChoice, NewJob, NewRequest, NewWorker, StepRow
from storage.session import Database
from storage.steps.columns import StepColumns


def a_worker_card(**fields: Any) -> NewWorker:
    """A worker that serves `tiny` on a CPU."""
    card: dict[str, Any] = {
        "id": "worker-1",
        "hostname": "localhost",
        "pid": 1,
        "target": "tiny",
        "draft": None,
        "devices": ("cpu",),
        "context_tokens": 4096,
        "calibration": {},
    }
    return NewWorker(**card | fields)


def a_key(database: Database, *scopes: Scope, lasts_s: float | None = None, **limits: int) -> dict[str, str]:
    """Store a key, with the scopes submit and read by default; return its Authorization header."""
    key, recorded = new_key("somebody", scopes or (Scope.SUBMIT, Scope.READ), KeyLimits(**limits), lasts_s)
    with database.write() as session:
        keys.add_key(session, recorded)
    return {"authorization": f"Bearer {key}"}


def a_step(**fields: Any) -> StepRow:
    """A step of 10 ms with one accepted draft token and the target's own."""
    step: dict[str, Any] = {
        "step": 1,
        "tree_nodes": 4,
        "tree_depth": 2,
        "accepted_tokens": 1,
        "emitted_tokens": 2,
        "expected_accepted": 1.5,
        "draft_ms": 1.0,
        "verify_ms": 8.0,
        "step_ms": 10.0,
        "batch_sequences": 1,
        "drafter": "suffix",
        "plain_step_ms": 9.0,
        "decision": "tree",
        "ended_at": 1.0,
    }
    return StepRow(**step | fields)


def a_checkpoint(text: str = "Hi", **fields: Any) -> Checkpoint:
    """A checkpoint of two tokens; the first is an accepted draft token."""
    checkpoint: dict[str, Any] = {
        "choice_index": 0,
        "seq": 1,
        "token_ids": (1, 2),
        "accepted": (True, False),
        "text": text,
        "pieces": ((text[:1], "draft"), (text[1:], "target")),
        "steps": (a_step(),),
    }
    checkpoint |= fields
    return Checkpoint(**checkpoint | {"steps": StepColumns.of(checkpoint["steps"])})


def a_finished_choice(text: str = "Hi", **fields: Any) -> FinishedChoice:
    """A finished choice of two tokens."""
    choice: dict[str, Any] = {
        "choice_index": 0,
        "text": text,
        "token_ids": (1, 2),
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "started_at": 1.0,
        "finished_at": 2.0,
        "last_seq": 2,
    }
    return FinishedChoice(**choice | fields)


def a_job(job_id: str = "job-1", **fields: Any) -> NewJob:
    """A job for `tiny` with a window of one day."""
    job: dict[str, Any] = {"id": job_id, "model": "tiny", "endpoint": "/v1/chat/completions", "window_s": 86_400.0}
    return NewJob(**job | fields)


def a_request(custom_id: str = "request-0", **fields: Any) -> NewRequest:
    """A valid request."""
    request: dict[str, Any] = {"body": {"v": 1, "model": "tiny", "prompt": "Hello", "sampling": {"seed": 1}}}
    return NewRequest(custom_id, **request | fields)


def some_requests(count: int) -> list[NewRequest]:
    """Valid requests."""
    return [a_request(f"request-{index}") for index in range(count)]


def some_steps(*emitted: int, first: int = 0) -> tuple[StepRow, ...]:
    """Steps that emit these numbers of tokens, all but one of them accepted draft tokens. Step 0 is that of prefill."""
    return tuple(
        a_step(
            step=first + number,
            tree_nodes=0 if first + number == 0 else 10,
            tree_depth=0 if first + number == 0 else 6,
            accepted_tokens=tokens - 1,
            emitted_tokens=tokens,
            plain_step_ms=None if first + number == 0 else 9.0,
        )
        for number, tokens in enumerate(emitted)
    )
