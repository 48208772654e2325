"""Validate the lines of a batch file in a cheap first pass, before any request is stored.

An invalid line fails alone. The batch fails, with an error per line, if no line is valid, if it is too large, or if two
lines have the same custom_id, because results could not be assigned to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from jobs.errors import BasicError, InvalidJsonLine, InvalidValue
from jobs.openai.paths import endpoint_of_line
from jobs.submission.custom_ids import CustomIds, GivenId
from jobs.submission.input_lines import Line, Sample, find_custom_id
from jobs.submission.items import Item, read_line
from jobs.submission.models import ModelNames
from jobs.submission.request_parser import MAX_CUSTOM_ID_CHARS, given_id, is_post, is_url_of
from jobs.submission.values import clean_text

MAX_ERRORS: Final = 100


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Maximum size of a batch."""

    requests: int
    line_bytes: int


class BadLine(BasicError):
    """The line is not a valid request of the batch."""

    status_code = 400

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        """Take the code of OpenAI's BatchError, the message and the field."""
        super().__init__(message, param=param)
        self.code = code


@dataclass(slots=True)
class ValidationResult:
    """Model, requests and ids of a batch file, or the errors for which the batch fails."""

    errors: list[dict[str, Any]] = field(default_factory=list)  # at most MAX_ERRORS; empty if the batch is valid
    model: str = ""
    requests: int = 0
    ids: CustomIds = field(default_factory=CustomIds)

    def add(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        """Add an error with the fields of OpenAI's BatchError."""
        self.errors.append({"code": code, "line": line, "message": message, "param": param})


def validate_lines(lines: Iterable[Line], endpoint: str, models: ModelNames, limits: BatchLimits) -> ValidationResult:
    """Validate the lines of a batch file. Its model is the first that a line names, else the default of `models`."""
    result, reader = ValidationResult(), LineReader(endpoint, models, limits.line_bytes)
    invalid, duplicates, sample = ValidationResult(), ValidationResult(), Sample()
    for index, line in enumerate(lines):
        result.requests += 1
        if result.requests > limits.requests:
            result.add("too_many_tasks", f"A batch may have at most {limits.requests} requests. Split the file.")
            return result
        item, problem = reader.read(index, line)
        sample.add(line.text, problem is None)
        if problem is not None:
            _add(invalid, problem, line.number)
        earlier = result.ids.add(index, item.location, own_id(item))
        if earlier is not None:
            message = f"The custom_id {item.value['custom_id']!r} is also used by {earlier}."
            _add(duplicates, BadLine("duplicate_custom_id", message, "custom_id"), line.number)
        elif problem is None:
            result.model = reader.model or result.model or models.default
    if not result.requests:
        result.add("empty_file", "The file has no requests.")
    elif (kind := sample.describe_format()) is not None:
        result.add("invalid_json_line", kind, 1)
    elif not result.model or duplicates.errors:
        found = (duplicates.errors + invalid.errors)[:MAX_ERRORS]
        result.errors = sorted(found, key=lambda error: int(error["line"]))
    return result


def own_id(item: Item) -> GivenId | None:
    """Return the id of a line. Only `custom_id` counts as the request's own, not `id`."""
    given = given_id(item)
    if (
        given is None
        or not given.is_own
        or (isinstance(item.value, dict) and item.value.get("custom_id") == given.text)
    ):
        return given
    return GivenId(given.text, is_own=False)


def _add(result: ValidationResult, problem: BasicError, line: int) -> None:
    if len(result.errors) < MAX_ERRORS:
        result.add(problem.code or "invalid_request", problem.message, line, problem.param)


class LineReader:
    """Parses lines and checks their structure."""

    def __init__(self, endpoint: str, models: ModelNames, line_bytes: int, model: str = "") -> None:
        """Take the batch's model; empty: use that of the first valid line."""
        self.model = model
        self._endpoint = endpoint
        self._models = models
        self._line_bytes = line_bytes

    def read(self, index: int, line: Line) -> tuple[Item, BasicError | None]:
        """Return the item of a line, and its first error, if any."""
        try:
            item = Item(index, read_line(line, self._line_bytes), line.number)
            if not isinstance(item.value, dict):
                raise InvalidJsonLine("The line is not a JSON object.")
            _check_custom_id(item.value)
            if _is_bare(item.value):
                self._check_bare_body(item.value)
            else:
                _check_method(item.value)
                self._check_url(item.value)
            self._check_body(item.value)
        except InvalidJsonLine as exc:
            return Item(index, exc, line.number, find_custom_id(line.text)), exc
        except BadLine as exc:
            return item, exc
        return item, None

    def _check_url(self, line: dict[str, Any]) -> None:
        _require(line, "url", str, "a string")
        if not is_url_of(line["url"], self._endpoint):
            raise BadLine("invalid_url", f"url must be the batch's endpoint, {self._endpoint}.", "url")

    def _check_bare_body(self, line: dict[str, Any]) -> None:
        endpoint = endpoint_of_line(line)
        if endpoint is not None and endpoint != self._endpoint:
            message = f"The body is one of {endpoint}, but the batch's endpoint is {self._endpoint}."
            raise BadLine("invalid_url", message, "body")

    def _check_body(self, line: dict[str, Any]) -> None:
        _require(line, "body", dict, "an object")
        asked = line["body"].get("model")
        if asked is None and _is_bare(line):
            return  # Mistral's lines leave the model to the batch
        if asked is None:
            raise BadLine("missing_required_parameter", "The body has no model.", "body.model")
        model = self._models.find(asked)
        if model is None:
            raise BadLine("model_not_found", self._models.refusal(asked), "body.model")
        self.model = self.model or model
        if model != self.model:
            message = f"This batch uses the model {self.model}. Submit requests for other models as another batch."
            raise BadLine("mismatched_model", message, "body.model")


def _is_bare(line: dict[str, Any]) -> bool:
    """Return whether a line has only a body, as Together and Mistral write it."""
    return line.get("method") is None and line.get("url") is None and line.get("body") is not None


def _require(line: dict[str, Any], name: str, kind: type, what: str) -> None:
    if line.get(name) is None:
        raise BadLine("missing_required_parameter", f"The line has no {name}.", name)
    if not isinstance(line[name], kind):
        raise BadLine("invalid_request", f"{name} must be {what}.", name)


def _check_custom_id(line: dict[str, Any]) -> None:
    _require(line, "custom_id", str, "a string")
    custom_id = line["custom_id"]
    if not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"custom_id must have 1 to {MAX_CUSTOM_ID_CHARS} characters."
        raise BadLine("invalid_request", message, "custom_id")
    try:
        clean_text(custom_id, "custom_id")
    except InvalidValue as exc:
        raise BadLine("invalid_request", exc.message, "custom_id") from exc


def _check_method(line: dict[str, Any]) -> None:
    _require(line, "method", str, "a string")
    if not is_post(line["method"]):
        raise BadLine("invalid_method", "method must be POST.", "method")
