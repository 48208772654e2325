"""All errors of bASIC, as one tree of exceptions. The docstring of a class is its default message.

BasicError
├── RequestRefused              one request is invalid; the other requests of its job run
│   ├── InvalidValue            a field's value is out of range
│   ├── MissingParameter        a required field is missing
│   ├── UnknownParameter        a field is unknown (often misspelt)
│   ├── UnsupportedParameter    a field of the OpenAI API that bASIC does not support
│   ├── InvalidJsonLine         a line is not a JSON object
│   ├── PromptTooLong           the prompt fills the context: no token can be generated
│   ├── UnknownResponse         previous_response_id names no response of the caller
│   └── UnreadableRequest       the stored request can't be decoded
├── JobRefused                  the whole job is rejected
│   ├── UnknownModel            no worker serves this model
│   ├── DuplicateCustomId       two requests of one job have the same custom_id
│   ├── EmptyJob                a job without requests
│   ├── TooManyRequests         more requests than a job may have
│   ├── IdempotencyConflict     the key was used for another body
│   ├── BodyTooLarge            the body exceeds the size limit
│   ├── BodyTooSlow             the body did not arrive within the timeout
│   └── UnsupportedBody         wrong content type or encoding
├── NotFound                    no such job, batch or file
├── NotCancellable              the job has already ended
├── NoPilot                     the job has no pilot, or none that predicts anything
├── PilotRunning                its pilot has not ended
├── BudgetSpent                 the job would pause again at once
├── UploadEnded                 the upload is completed, cancelled or expired
├── NotRetryable                the job has not ended, or all its requests succeeded
├── NotDeletable                the job has not ended
├── WebhookUnreachable          an endpoint did not answer a test
├── NotVerifiable               no request of the job has an output to verify
├── CallerRefused               authentication, permission or rate limit
│   ├── InvalidKey              missing or invalid API key
│   ├── NotPermitted            the key lacks the scope
│   ├── HostNotServed           the Host header names an unknown host
│   ├── CrossSite               a page of another site calls without a key
│   └── LimitReached            a limit is exceeded; try again later
│       └── QueueFull           too many requests of all callers wait
├── AnswerUnreadable            the client can't read an answer as the value that was asked for
├── RequestFailed               a single (interactive) request failed
│   └── AnswerTooLate           it timed out
├── ServiceUnavailable          a part of the service is down
│   ├── QueueUnavailable        the Redis server is down
│   └── DatabaseUnavailable     the database is down
│       ├── DatabaseReadOnly    it is read-only
│       └── StorageFull         its disk is full
└── SetupError                  the installation or its settings are wrong
    ├── ChildRefused            a child process can't start with its settings or model
    └── UnknownSetting          a BASIC_… variable that nothing reads
"""

from __future__ import annotations

from typing import Any


class BasicError(Exception):
    """Something went wrong in bASIC."""

    code: str | None = None
    status_code: int = 500

    def __init__(self, message: str | None = None, *, param: str | None = None, line: int | None = None) -> None:
        """Take the message (default: the class docstring), the field `param`, and the 1-based line number."""
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        self.line = line
        super().__init__(self.message)

    def __str__(self) -> str:
        """Return the message, prefixed by line and field."""
        where = [f"line {self.line}"] if self.line is not None else []
        where += [self.param] if self.param else []
        return f"{', '.join(where)}: {self.message}" if where else self.message


class RequestRefused(BasicError):
    """The request is invalid."""

    code = "invalid_value"
    status_code = 400


class InvalidValue(RequestRefused):
    """The value of a field is out of range."""


class MissingParameter(RequestRefused):
    """A required field is missing."""

    code = "missing_required_parameter"


class UnknownParameter(RequestRefused):
    """The field is unknown."""

    code = "unknown_parameter"


class UnsupportedParameter(RequestRefused):
    """The field is not supported."""

    code = "unsupported_parameter"


class InvalidJsonLine(RequestRefused):
    """The line is not a JSON object."""

    code = "invalid_json_line"


class PromptTooLong(RequestRefused):
    """The prompt fills the model's context: there is no space for a new token."""

    code = "context_length_exceeded"


class UnknownResponse(RequestRefused):
    """There is no such response."""

    code = "previous_response_not_found"
    status_code = 404


class UnreadableRequest(RequestRefused):
    """This version can't decode the stored request."""

    code = "server_error"
    status_code = 500


class JobRefused(BasicError):
    """The job is rejected."""

    code: str | None = "invalid_value"
    status_code = 400


class UnknownModel(JobRefused):
    """No worker serves this model."""

    code = "model_not_found"
    status_code = 404


class DuplicateCustomId(JobRefused):
    """Two requests of one job have the same custom_id."""

    code = "duplicate_custom_id"


class EmptyJob(JobRefused):
    """A job needs at least one request."""

    code = "empty_job"


class TooManyRequests(JobRefused):
    """The job has too many requests."""

    code = "too_many_requests"


class IdempotencyConflict(JobRefused):
    """This Idempotency-Key was used for another body."""

    code = "idempotency_conflict"
    status_code = 409


class BodyTooLarge(JobRefused):
    """The body is too large."""

    code = "file_too_large"
    status_code = 413


class BodyTooSlow(JobRefused):
    """The body did not arrive in time."""

    code = None
    status_code = 408


class UnsupportedBody(JobRefused):
    """Send application/json with a list of requests, or application/x-ndjson with one request per line."""

    code = None
    status_code = 415


class NotFound(BasicError):
    """Nothing has this id."""

    status_code = 404


class UploadEnded(BasicError):
    """The upload is completed, cancelled or expired."""

    code = "upload_ended"
    status_code = 409


class NotCancellable(BasicError):
    """The job has already ended."""

    status_code = 409


class JobEnded(BasicError):
    """The job has ended."""

    code = "job_ended"
    status_code = 409


class NoPilot(BasicError):
    """The job has no pilot: submit it with `pilot`, or with `basic estimate FILE`."""

    code = "no_pilot"
    status_code = 409


class PilotRunning(BasicError):
    """The pilot of the job has not ended."""

    code = "pilot_running"
    status_code = 409


class BudgetSpent(BasicError):
    """The job has spent its budget."""

    code = "budget_spent"
    status_code = 409


class IsInteractive(BasicError):
    """An interactive request can't be paused or changed."""

    code = "interactive_request"
    status_code = 409


class NotRetryable(BasicError):
    """The job has no unsuccessful requests to run again."""

    code = "not_retryable"
    status_code = 409


class NotDeletable(BasicError):
    """The job has not ended."""

    code = "not_deletable"
    status_code = 409


class WebhookUnreachable(BasicError):
    """The webhook endpoint was not reached."""

    code = "webhook_unreachable"
    status_code = 400


class NotVerifiable(BasicError):
    """No request of the job has an output to verify."""

    code = "not_verifiable"
    status_code = 409


class CallerRefused(BasicError):
    """The caller is not allowed to do this."""

    status_code = 403


class InvalidKey(CallerRefused):
    """Missing or invalid API key. Set BASIC_API_KEY, or send Authorization: Bearer KEY."""

    code = "invalid_api_key"
    status_code = 401


class NotPermitted(CallerRefused):
    """The API key lacks the scope for this."""

    code = "insufficient_permissions"


class HostNotServed(CallerRefused):
    """The service does not answer to this host."""

    code = "host_not_served"
    status_code = 421

    @classmethod
    def by(cls, host: str) -> HostNotServed:
        """Return the error for a host, naming the setting that allows it."""
        return cls(
            f"The service does not answer to the host {host[:80]!r}. Call it by the address it listens on or by "
            "localhost, or add the name to BASIC_API_NAMES (comma-separated) and restart the API server."
        )


class CrossSite(CallerRefused):
    """A page of another site may not call the service without a key."""

    code = "cross_site_refused"


class LimitReached(CallerRefused):
    """A limit is exceeded; try again later."""

    code = "rate_limit_exceeded"
    status_code = 429

    def __init__(self, message: str | None = None, *, retry_after_s: float = 10.0, **fields: Any) -> None:
        """Take the seconds for the Retry-After header."""
        super().__init__(message, **fields)
        self.retry_after_s = retry_after_s


class QueueFull(LimitReached):
    """The queue is full; try again later."""

    code = "queue_full"


class AnswerUnreadable(BasicError):
    """The answer is not the value that was asked for."""


class RequestFailed(BasicError):
    """The request failed."""

    code: str | None = "server_error"

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        status_code: int | None = None,
        param: str | None = None,
    ) -> None:
        """Take the error that is stored with the request."""
        super().__init__(message, param=param)
        self.code = code or type(self).code
        self.status_code = status_code or type(self).status_code


class AnswerTooLate(RequestFailed):
    """The request timed out."""

    code = "request_timeout"
    status_code = 504


class ServiceUnavailable(BasicError):
    """A part of the service is down; try again in a few seconds."""

    status_code = 503


class QueueUnavailable(ServiceUnavailable):
    """The Redis server does not answer; try again in a few seconds."""

    code = "queue_unavailable"


class DatabaseUnavailable(ServiceUnavailable):
    """The database does not answer; try again in a few seconds."""

    code = "database_unavailable"


class DatabaseReadOnly(DatabaseUnavailable):
    """The database is read-only: jobs and outputs can be read, but nothing can be submitted or changed."""


class StorageFull(DatabaseUnavailable):
    """The disk of the database is full; nothing was saved. Free space and try again."""

    code = "storage_full"
    status_code = 507


class SetupError(BasicError):
    """The installation or its settings are wrong."""


class ChildRefused(SetupError):
    """A process of the service can't start with its settings or model; starting it again would not help."""


class UnknownSetting(SetupError):
    """Nothing reads this BASIC_… environment variable."""
