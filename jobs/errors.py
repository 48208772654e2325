"""Everything that can go wrong, as one tree. A class docstring is the default message.

BasicError
├── RequestRefused              one request can't be served; the others of its job go on
│   ├── InvalidValue            a field has a value outside its range
│   ├── MissingParameter        a required field is absent
│   ├── UnknownParameter        a field we don't know (often a misspelt one)
│   ├── UnsupportedParameter    a field we know and don't honour yet
│   ├── InvalidJsonLine         a line is not a JSON object
│   ├── PromptTooLong           the prompt leaves no room for one new token
│   └── GivenUp                 the request was taken up too often without an end
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
├── ServiceUnavailable          a part of the service can't be reached right now
│   ├── QueueUnavailable        the Redis server does not answer
│   └── DatabaseUnavailable     the database does not answer
└── SetupError                  the installation or its settings are not usable
    └── UnknownSetting          a BASIC_… variable that nothing reads
"""

from __future__ import annotations

from typing import ClassVar


class BasicError(Exception):
    """Something went wrong in bASIC."""

    code: ClassVar[str | None] = None
    status_code: ClassVar[int] = 500

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


class GivenUp(RequestRefused):
    """The request was taken up too often without an end."""

    code = "server_error"
    status_code = 500


class JobRefused(BasicError):
    """The job can't be accepted."""

    code: ClassVar[str | None] = "invalid_value"
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


class ServiceUnavailable(BasicError):
    """A part of the service can't be reached right now; try again in a few seconds."""

    status_code = 503


class QueueUnavailable(ServiceUnavailable):
    """The Redis server does not answer; try again in a few seconds."""


class DatabaseUnavailable(ServiceUnavailable):
    """The database does not answer; try again in a few seconds."""


class SetupError(BasicError):
    """The installation or its settings are not usable."""


class UnknownSetting(SetupError):
    """An environment variable starts with BASIC_ and is read by nothing."""
