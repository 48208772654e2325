"""Convert database rows to the JSON objects of responses, in OpenAI's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from jobs.messages import JobStatus
from jobs.openai.completions import answer_format, call_id, choice_parts, finish_reason, usage
from jobs.openai.errors import error_body
from jobs.openai.logprobs import logprobs_object
from jobs.openai.prompt_details import PromptDetails
from jobs.reports.pilot.estimate import Estimate, Pilot
from jobs.reports.progress import elapsed_s, time_left_s
from jobs.submission.checking import SubmissionCheck
from storage.files import FileView
from storage.numerics import Numerics
from storage.pilots import PilotRecord
from storage.priorities import priority_of
from storage.queries import ChoiceView, JobStats, JobView, OutputView, WorkerView
from storage.statuses import FINAL_JOB_STATUSES

Json = dict[str, Any]


def job(view: JobView) -> Json:
    """Return a job. Times are whole Unix seconds, null until they are reached."""
    return {
        "id": view.id,
        "object": "job",
        "status": view.status,
        "model": view.model,
        "endpoint": view.endpoint,
        "input_file_id": view.input_file_id,
        "output_file_id": view.output_file_id,
        "error_file_id": view.error_file_id,
        "errors": _errors(view),
        **_lifecycle(view, view.started_at),
        "progress": _progress(view),
        "metadata": view.metadata,
        "name": view.name,
        "labels": dict(view.metadata or {}),
        "priority": priority_of(view.priority_class),
        "max_concurrent": view.max_concurrent,
        "budget": _budget(view),
        **_pause(view),
        "retry_of": view.retry_of,
        "prompts_deleted_at": _second(view.prompts_deleted_at),
        "outputs_deleted_at": _second(view.outputs_deleted_at),
        **({} if view.verification_of is None else {"verification_of": view.verification_of}),
        **({} if view.sampling_defaults is None else {"sampling_defaults": dict(view.sampling_defaults)}),
    }


def check(checked: SubmissionCheck) -> Json:
    """Return the check of a submission. Tokens of prompts are estimated from their bytes: no tokenizer is here."""
    return {
        "object": "job.check",
        "model": checked.model,
        "endpoint": checked.endpoint,
        "context_tokens": checked.context_tokens,
        "request_counts": {
            "total": checked.total,
            "accepted": checked.total - checked.refused,
            "refused": checked.refused,
        },
        "prompt_tokens": checked.prompt_tokens,
        "prompt_tokens_source": "bytes",
        "max_output_tokens": checked.max_output_tokens,
        "requests_without_max_tokens": checked.without_max_tokens,
        "refused": [asdict(refused) for refused in checked.refusals],
        "limit": checked.limit,
    }


def job_estimate(job_id: str, record: PilotRecord, pilot: Pilot, found: Estimate, power_source: str | None) -> Json:
    """Return the prediction of a job from its pilot."""
    return {
        "object": "job.estimate",
        "job_id": job_id,
        "pilot": {
            "requests": record.requests,
            "completed": len(pilot.requests),
            "prompt_tokens": sum(request.prompt_tokens for request in pilot.requests),
            "completion_tokens": sum(text.completion_tokens for text in record.outputs),
        },
        "rest": {
            "requests": len(pilot.rest) + record.copied,
            "requests_cached": record.copied,
            **asdict(found),
        },
        "workers": pilot.workers,
        "batch_sequences": pilot.slots,
        "power_w": pilot.power_w,
        "power_source": power_source,
    }


def _budget(view: JobView) -> Json | None:
    if view.budget_tokens is None and view.budget_s is None:
        return None
    return {"tokens": view.budget_tokens, "seconds": view.budget_s}


def _pause(view: JobView) -> Json:
    """Return since when and why a job is paused; null once it runs again or ends."""
    paused = view.paused_at is not None and view.status in (JobStatus.VALIDATING, JobStatus.PAUSED)
    return {
        "paused_at": _second(view.paused_at if paused else None),
        "pause_reason": view.pause_reason if paused else None,
    }


def batch(view: JobView) -> Json:
    """Return a batch with all fields of OpenAI's Batch, null until they are set. OpenAI knows no status `paused`."""
    return {
        "id": view.id,
        "object": "batch",
        "status": JobStatus.IN_PROGRESS if view.status == JobStatus.PAUSED else view.status,
        "model": view.model or None,
        "endpoint": view.endpoint,
        "input_file_id": view.input_file_id,
        "output_file_id": view.output_file_id,
        "error_file_id": view.error_file_id,
        "errors": _errors(view),
        **_lifecycle(view, view.validated_at),
        "usage": _batch_usage(view.usage),
        "metadata": view.metadata,
    }


def file(view: FileView) -> Json:
    """Return a file with OpenAI's fields. It is `processed` at once: lines are validated by the batch."""
    return {
        "id": view.id,
        "object": "file",
        "bytes": view.bytes,
        "created_at": int(view.created_at),
        "expires_at": _second(view.expires_at),
        "filename": view.filename,
        "purpose": view.purpose,
        "status": "processed",
        "status_details": None,
    }


def _lifecycle(view: JobView, in_progress_at: float | None) -> Json:
    """Return the fields that jobs and batches share: window, times and request counts."""
    status = JobStatus(view.status)
    return {
        "completion_window": view.completion_window or _window(view.expires_at - view.created_at),
        "created_at": int(view.created_at),
        "in_progress_at": _second(in_progress_at),
        "expires_at": int(view.expires_at),
        "finalizing_at": _second(view.finalizing_at),
        "cancelling_at": _second(view.cancelling_at),
        **{f"{end}_at": _second(view.finished_at if status == end else None) for end in FINAL_JOB_STATUSES},
        "request_counts": {
            "total": view.requests_total,
            "completed": view.requests_completed,
            "failed": view.requests_failed,
        },
    }


def _errors(view: JobView) -> Json | None:
    return None if view.errors is None else {"object": "list", "data": list(view.errors)}


def _batch_usage(tokens: Mapping[str, int] | None) -> Json | None:
    """Return the token usage of the batch. OpenAI's details are 0: cached and reasoning tokens are not counted."""
    if tokens is None:
        return None
    return {
        "input_tokens": tokens["input_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": tokens["output_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens["input_tokens"] + tokens["output_tokens"],
    }


def page(items: Sequence[Json], has_more: bool) -> Json:
    """Return a page of a list, with the ids of its first and last item to page from."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def output(view: OutputView, endpoint: str, job_id: str) -> Json:
    """Return one line of a job's outputs: the choices of a request, or its error."""
    line: Json = {"custom_id": view.custom_id, "index": view.request_index, "status": view.status}
    line |= {} if view.keep is None else {"keep": view.keep}
    line |= {} if view.body is None else {"prompt": _prompt(view.body)}
    if view.error_message is not None:
        status_code = view.error_status_code or 500
        line |= error_body(status_code, view.error_message, view.error_param, view.error_code)
        if not view.choices:
            return line
    form, call = answer_format(view), partial(call_id, job_id, view.request_index)
    choices = [
        {
            "index": choice.choice_index,
            "text": choice.text,
            **(choice_parts(form, choice, call) if form is not None else {}),
            "finish_reason": finish_reason(form, choice),
            "completion_tokens": choice.completion_tokens,
            **({} if choice.numerics is None else {"numerics": choice.numerics}),
            **({} if choice.cached_from is None else {"cached_from": choice.cached_from}),
            **_details(choice, endpoint),
        }
        for choice in view.choices
    ]
    defaults = {} if view.sampling_defaults is None else {"sampling_defaults": dict(view.sampling_defaults)}
    return line | {"choices": choices, "usage": usage(view), **defaults}


def _prompt(body: Mapping[str, Any]) -> Any:
    """Return the prompt of a stored request: a text, a list of prompts, or messages without their unset fields."""
    if body.get("messages") is None:
        return body.get("prompt") or body.get("prompts")
    return [{name: value for name, value in message.items() if value not in (None, [])} for message in body["messages"]]


def _details(choice: ChoiceView, endpoint: str) -> Json:
    """Return log-probabilities and token ids of a choice and its prompt, as requested."""
    prompt = PromptDetails.read(choice.prompt)
    logprobs = logprobs_object(endpoint, choice.logprobs, choice.text, prompt.echoed)
    own = {} if prompt.token_ids is None else {"token_ids": choice.token_ids}
    return ({} if logprobs is None else {"logprobs": logprobs}) | own | prompt.fields()


def statistics(view: JobStats) -> Json:
    """Return the statistics of a job, or of all jobs."""
    return asdict(view)


def worker(view: WorkerView) -> Json:
    """Return a worker with its cost curves and the load that it last reported."""
    return asdict(view)


def numerics(view: Numerics) -> Json:
    """Return the parts of a fingerprint."""
    return {"fingerprint": view.fingerprint, "object": "numerics", "parts": dict(view.parts)}


def model(name: str, context_tokens: int | None) -> Json:
    """Return a model: OpenAI's fields, and the context length if a worker has reported it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "basic", "context_tokens": context_tokens}


def _progress(view: JobView) -> Json:
    run_s = elapsed_s(view)
    left_s = 0.0 if JobStatus(view.status).final else None if view.status == JobStatus.PAUSED else time_left_s(view)
    return {
        "prompt_tokens": view.prompt_tokens,
        "completion_tokens": view.completion_tokens,
        "requests_cached": view.requests_cached,
        "cached_tokens": view.cached_prompt_tokens + view.cached_completion_tokens,
        "elapsed_s": round(run_s, 3),
        "tokens_per_s": round(view.computed_completion_tokens / run_s, 3) if run_s > 0 else None,
        "time_left_s": None if left_s is None else round(left_s, 1),
    }


def _window(window_s: float) -> str:
    """Format a duration like the completion window of a submission."""
    minutes = max(1, round(window_s / 60))
    return f"{minutes // 60}h" if minutes % 60 == 0 else f"{minutes}m"


def _second(at: float | None) -> int | None:
    return None if at is None else int(at)
