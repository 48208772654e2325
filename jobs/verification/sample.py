"""Start a verification: copy a random sample of a job's completed requests into a job that decodes them plainly."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.orm import Session

from jobs.errors import InvalidValue, NotVerifiable
from jobs.messages import DEFAULTED_SAMPLING, MESSAGE_VERSION, GenerationRequest
from jobs.producer import Notify
from jobs.settings import JobsSettings
from jobs.submission.intake import check_idempotency_key, store_copies
from jobs.submission.models import known_models
from jobs.submission.request_parser import max_total_tokens
from storage import verifications
from storage.queries import JobView
from storage.records import NewJob, NewRequest
from storage.session import Database
from storage.verifications import SampledOutput

DEFAULT_SAMPLE: Final = "1%"
MAX_SAMPLE: Final = 10_000  # requests of one verification
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")
_COUNT = re.compile(r"\d{1,9}")


@dataclass(frozen=True, slots=True)
class SampleSize:
    """How many of a job's completed requests are computed again: a share in percent, or a number."""

    asked: str
    percent: float | None = None
    number: int | None = None

    @classmethod
    def read(cls, asked: Any) -> SampleSize:
        """Return what `1%` or `20` ask for. Raises InvalidValue."""
        text = str(asked).strip() if isinstance(asked, str | int) and not isinstance(asked, bool) else ""
        share = _SHARE.fullmatch(text)
        if share is not None and 0 < float(share[1]) <= 100:
            return cls(text, percent=float(share[1]))
        if _COUNT.fullmatch(text) and int(text) > 0:
            return cls(text, number=int(text))
        raise InvalidValue(f"must be a share such as 1% or a number of requests, not {asked!r:.80}", param="sample")

    def of(self, completed: int) -> int:
        """Return the number of requests: at least one. Raises InvalidValue beyond MAX_SAMPLE."""
        wanted = self.number or math.ceil((self.percent or 0.0) / 100 * completed)
        count = min(completed, wanted)
        if count > MAX_SAMPLE:
            raise InvalidValue(
                f"{self.asked} are {count:,} requests; a verification has at most {MAX_SAMPLE:,}", param="sample"
            )
        return count


def start_verification(
    job: JobView,
    asked: Any,
    *,
    idempotency_key: str | None = None,
    database: Database,
    notify: Notify,
    settings: JobsSettings,
) -> str:
    """Store the verification of a job and return its id. It belongs to the job's owner and counts in the key's limits.

    Raises InvalidValue for a wrong sample, and NotVerifiable if there is nothing to compute again.
    """
    sample = SampleSize.read(asked)
    if job.verification_of is not None:
        raise NotVerifiable(f"{job.id} is itself a verification; verify {job.verification_of}.")
    models = known_models(database, settings)
    context_tokens = models.context_tokens(models.resolve(job.model))
    seed = secrets.randbits(63)
    new_job = NewJob(
        id=f"verify_{secrets.token_hex(16)}",
        model=job.model,
        endpoint=job.endpoint,
        window_s=settings.completion_window_s,
        metadata={"sample": sample.asked, "seed": str(seed)},
        api_key_id=job.api_key_id,
        idempotency_key=check_idempotency_key(idempotency_key),
        body_sha256=hashlib.sha256(f"{sample.asked} of {job.id}".encode()).hexdigest(),
        body_version=MESSAGE_VERSION,
        verification_of=job.id,
    )

    def drawn(session: Session) -> Iterator[NewRequest]:
        count = sample.of(verifications.completed_requests(session, job.id))
        return (_copy(one, context_tokens) for one in verifications.draw_sample(session, job.id, count, seed))

    none_left = NotVerifiable(f"No request of {job.id} has a prompt and an output.")
    return store_copies(new_job, drawn, none_left, database=database, notify=notify, settings=settings)


def _copy(output: SampledOutput, context_tokens: int | None) -> NewRequest:
    """Return a request that computes the same text, for any sampling defaults of the next worker's model."""
    request = GenerationRequest.model_validate(output.body)
    defaults = dict(output.plan.sampling_defaults or {})
    given = {name: value for name, value in defaults.items() if name not in request.sampling.model_fields_set}
    unset = {name: getattr(request.sampling, name) for name in DEFAULTED_SAMPLING}
    copy = request.model_copy(
        update={"sampling": request.sampling.model_copy(update={**unset, **given, "record_trees": 0}), "keep": None}
    )
    return NewRequest(str(output.request_index), copy.stored(), tokens=max_total_tokens(copy, context_tokens))
