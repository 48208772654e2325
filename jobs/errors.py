"""Everything that can go wrong, as one tree. A class docstring is the default message.

BasicError
├── RequestRefused              one request can't be served; the others of its job go on
│   ├── InvalidValue            a field has a value outside its range
│   ├── MissingParameter        a required field is absent
│   ├── UnknownParameter        a field we don't know (often a misspelt one)
│   ├── UnsupportedParameter    a field we know and don't honour yet
│   ├── InvalidJsonLine         a line is not a JSON object
│   ├── PromptTooLong           the prompt leaves no room for one new token
│   └── UnreadableRequest       the stored request can't be read
├── JobRefused                  the job as a whole can't be accepted
│   ├── UnknownModel            no worker serves this model
│   ├── DuplicateCustomId       two requests of one job carry the same custom_id
│   ├── EmptyJob                a job without requests
│   ├── TooManyRequests         more requests than one job may hold
│   ├── IdempotencyConflict     the key was used for another body
│   ├── BodyTooLarge            the body has more bytes than one submission may
│   ├── BodyTooSlow             the body stopped coming
│   └── UnsupportedBody         the body is of a type, or packed in a way, that we don't take
├── NotFound                    no such job, batch or file
├── NotCancellable              the job has already ended
├── NotRetryable                the job has not ended, or has nothing to run again
├── CallerRefused               who asks, or how much, is the trouble
│   ├── InvalidKey              no key, or one that opens nothing
│   ├── NotPermitted            the key does not have the scope for it
│   ├── HostNotServed           the call names a host that the service does not answer to
│   ├── CrossSite               a page of another site calls without a key
│   └── LimitReached            too much at once; later there is room again
│       └── QueueFull           more requests than the service lets wait, of all callers together
├── RequestFailed               a request that somebody waits for ended without an answer
│   └── AnswerTooLate           it was not written in time
├── ServiceUnavailable          a part of the service can't be reached right now
│   ├── QueueUnavailable        the Redis server does not answer
│   └── DatabaseUnavailable     the database does not answer
│       ├── DatabaseReadOnly    it may only be read
│       └── StorageFull         its disk is full
└── SetupError                  the installation or its settings are not usable
    ├── ChildRefused            a process of the service can't work with its settings or its model
    └── UnknownSetting          a BASIC_… variable that nothing reads
"""

from __future__ import annotations

from typing import Any


class BasicError(Exception):
    """Something went wrong in bASIC."""

    code: str | None = None
    status_code: int = 500

    def __init__(self, message: str | None = None, *, param: str | None = None, line: int | None = None) -> None:
        """Keep the message (default: the class docstring), the field it is about, and the 1-based line, if any."""
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        self.line = line
        super().__init__(self.message)

    def __str__(self) -> str:
        """Name line and field in front of the message, for people."""
        where = [f"line {self.line}"] if self.line is not None else []
        where += [self.param] if self.param else []
        return f"{', '.join(where)}: {self.message}" if where else self.message


class RequestRefused(BasicError):
    """This request can't be served."""

    code = "invalid_value"
    status_code = 400


class InvalidValue(RequestRefused):
    """A field has a value outside its range."""


class MissingParameter(RequestRefused):
    """A required field is absent."""

    code = "missing_required_parameter"


class UnknownParameter(RequestRefused):
    """This field is not known."""

    code = "unknown_parameter"


class UnsupportedParameter(RequestRefused):
    """This field is not supported."""

    code = "unsupported_parameter"


class InvalidJsonLine(RequestRefused):
    """The line is not a JSON object."""

    code = "invalid_json_line"


class PromptTooLong(RequestRefused):
    """The prompt leaves no room for one new token."""

    code = "context_length_exceeded"


class UnreadableRequest(RequestRefused):
    """The request as it is stored can't be read by this version."""

    code = "server_error"
    status_code = 500


class JobRefused(BasicError):
    """The job can't be accepted."""

    code: str | None = "invalid_value"
    status_code = 400


class UnknownModel(JobRefused):
    """No worker serves this model."""

    code = "model_not_found"
    status_code = 404


class DuplicateCustomId(JobRefused):
    """Two requests of one job carry the same custom_id."""

    code = "duplicate_custom_id"


class EmptyJob(JobRefused):
    """A job needs at least one request."""

    code = "empty_job"


class TooManyRequests(JobRefused):
    """The job holds more requests than one job may."""

    code = "too_many_requests"


class IdempotencyConflict(JobRefused):
    """This Idempotency-Key was used for another body."""

    code = "idempotency_conflict"
    status_code = 409


class BodyTooLarge(JobRefused):
    """The body has more bytes than one submission may have."""

    code = "file_too_large"
    status_code = 413


class BodyTooSlow(JobRefused):
    """The body did not arrive in time."""

    code = None
    status_code = 408


class UnsupportedBody(JobRefused):
    """Send application/json with a list of requests, or application/x-ndjson with one request a line."""

    code = None
    status_code = 415


class NotFound(BasicError):
    """There is nothing of this id."""

    status_code = 404


class NotCancellable(BasicError):
    """The job has already ended."""

    status_code = 409


class NotRetryable(BasicError):
    """The job has no request to run again."""

    code = "not_retryable"
    status_code = 409


class CallerRefused(BasicError):
    """This caller may not do this now."""

    status_code = 403


class InvalidKey(CallerRefused):
    """The request has no key, or one that opens nothing. Set BASIC_API_KEY, or send Authorization: Bearer KEY."""

    code = "invalid_api_key"
    status_code = 401


class NotPermitted(CallerRefused):
    """The key does not have the scope for this."""

    code = "insufficient_permissions"


class HostNotServed(CallerRefused):
    """The service does not answer to this host."""

    code = "host_not_served"
    status_code = 421

    @classmethod
    def by(cls, host: str) -> HostNotServed:
        """Say which host it is, and which setting adds one."""
        return cls(
            f"The service does not answer to the host {host[:80]!r}. Call it by the address it listens on or by "
            "localhost, or add the name to BASIC_API_NAMES (comma-separated) and restart the API server."
        )


class CrossSite(CallerRefused):
    """A page of another site may not call the service without a key."""

    code = "cross_site_refused"


class LimitReached(CallerRefused):
    """Too much at once; try again later."""

    code = "rate_limit_exceeded"
    status_code = 429

    def __init__(self, message: str | None = None, *, retry_after_s: float = 10.0, **fields: Any) -> None:
        """Say when it is worth another try."""
        super().__init__(message, **fields)
        self.retry_after_s = retry_after_s


class QueueFull(LimitReached):
    """As many requests wait as the service takes; try again later."""

    code = "queue_full"


class RequestFailed(BasicError):
    """The request ended without an answer."""

    code: str | None = "server_error"

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        status_code: int | None = None,
        param: str | None = None,
    ) -> None:
        """Keep what the record says about it."""
        super().__init__(message, param=param)
        self.code = code or type(self).code
        self.status_code = status_code or type(self).status_code


class AnswerTooLate(RequestFailed):
    """The answer was not written in time."""

    code = "request_timeout"
    status_code = 504


class ServiceUnavailable(BasicError):
    """A part of the service can't be reached right now; try again in a few seconds."""

    status_code = 503


class QueueUnavailable(ServiceUnavailable):
    """The Redis server does not answer; try again in a few seconds."""

    code = "queue_unavailable"


class DatabaseUnavailable(ServiceUnavailable):
    """The database does not answer; try again in a few seconds."""

    code = "database_unavailable"


class DatabaseReadOnly(DatabaseUnavailable):
    """The database can be read but not written: jobs and outputs are served, and nothing new is taken until it can."""


class StorageFull(DatabaseUnavailable):
    """The disk of the database is full; nothing was recorded. Try again when there is room."""

    code = "storage_full"
    status_code = 507


class SetupError(BasicError):
    """The installation or its settings are not usable."""


class ChildRefused(SetupError):
    """A process of the service can't work with its settings or its model; another start would end the same way."""


class UnknownSetting(SetupError):
    """An environment variable starts with BASIC_ and is read by nothing."""
