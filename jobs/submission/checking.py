"""Check a submission without storing anything: what would run, how many tokens it takes, and what would be refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from jobs.errors import LimitReached
from jobs.settings import JobsSettings
from jobs.submission.intake import Submission, check_queue_limit, new_job, open_submission, parse_all, quota_error
from jobs.submission.items import Item
from storage.keys import OpenWork, QuotaExceeded, enforce_limits_with
from storage.records import NewRequest
from storage.session import Database

MAX_REFUSED: Final = 100  # refused requests that a check lists


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that would be refused, with its place and field."""

    index: int
    line: int | None  # 1-based, of a file; None: the requests came as a list
    custom_id: str
    code: str
    param: str | None
    message: str


@dataclass(slots=True)
class SubmissionCheck:
    """What a submission would become."""

    model: str
    endpoint: str
    context_tokens: int | None  # of the workers that serve the model; None: no worker has reported it
    total: int = 0
    refused: int = 0
    prompt_tokens: int = 0  # of the accepted requests, estimated from their bytes
    max_output_tokens: int = 0  # at most, over all texts
    without_max_tokens: int = 0  # accepted requests that only the context bounds
    refusals: list[Refusal] = field(default_factory=list)  # the first MAX_REFUSED
    limit: str | None = None  # the limit of the key or the queue that refuses the job now
    line: int | None = None  # of the item that is being parsed

    def __len__(self) -> int:
        return self.total

    def add(self, request: NewRequest) -> None:
        """Count a request."""
        failure, index = request.failure, self.total
        self.total += 1
        if failure is None:
            self.prompt_tokens += request.prompt_tokens
            self.max_output_tokens += request.tokens - request.prompt_tokens
            self.without_max_tokens += (request.body or {})["sampling"].get("max_tokens") is None
            return
        self.refused += 1
        if len(self.refusals) < MAX_REFUSED:
            place = (index, self.line, request.custom_id)
            self.refusals.append(Refusal(*place, failure.code, failure.param, failure.message))

    def noted(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; remember the line of each."""
        for item in items:
            self.line = item.line
            yield item
            del item  # before the next one is read


def check_job(submission: Submission, *, database: Database, settings: JobsSettings) -> SubmissionCheck:
    """Check a submission as `create_job` does, and write nothing.

    Raise JobRefused, or InvalidValue for a field of the job, as the submission itself would.
    """
    rules, items = open_submission(submission, database, settings)
    new_job(submission, rules, settings)
    check = SubmissionCheck(rules.model, rules.endpoint, rules.context_tokens)
    ids = parse_all(check.noted(items), rules, settings.max_requests, check)
    check.refusals = [_renamed(refused, ids.get(refused.index)) for refused in check.refusals]
    accepted, tokens = check.total - check.refused, check.prompt_tokens + check.max_output_tokens
    work = OpenWork(accepted, tokens * accepted // check.total)  # as `storage.keys.open_work` counts a stored job
    check.limit = _limit(submission.api_key_id or "", work, database, settings.max_requests_queued)
    return check


def _renamed(refused: Refusal, custom_id: str | None) -> Refusal:
    return refused if custom_id is None else replace(refused, custom_id=custom_id)


def _limit(key_id: str, more: OpenWork, database: Database, max_queued: int) -> str | None:
    """Return the sentence of the limit that would refuse the work now; None if there is none."""
    try:
        with database.read() as session:
            enforce_limits_with(session, key_id, more)
            check_queue_limit(session, max_queued, more.requests)
    except QuotaExceeded as exceeded:
        return quota_error(exceeded).message
    except LimitReached as reached:
        return reached.message
    return None
