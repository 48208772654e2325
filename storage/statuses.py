"""The statuses of jobs, requests and files, and the sets of them that queries and clients ask for.

Imports nothing: the client uses these without a database.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class JobStatus(StrEnum):
    """Status of a job, in OpenAI's words and `paused`. The last four are final.

    It only moves forward, except between `in_progress` and `paused`.
    """

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    PAUSED = "paused"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """True when the job has ended and nothing about it changes any more."""
        return self in FINAL_JOB_STATUSES


class RequestStatus(StrEnum):
    """Status of one request of a job. The last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


# Values of `jobs.status`. A paused job has `in_progress` there and `paused_at` (storage.pausing.shown_status).
STORED_JOB_STATUSES: Final = tuple(status for status in JobStatus if status is not JobStatus.PAUSED)
# Jobs that ended without completing.
UNSUCCESSFUL_JOB_STATUSES: Final = (JobStatus.FAILED, JobStatus.EXPIRED, JobStatus.CANCELLED)
FINAL_JOB_STATUSES: Final = (JobStatus.COMPLETED, *UNSUCCESSFUL_JOB_STATUSES)
# Jobs whose requests may be queued or running.
ACTIVE_JOB_STATUSES: Final = (JobStatus.IN_PROGRESS, JobStatus.CANCELLING)
# Jobs whose unfinished requests count towards the limits of their API key.
QUOTA_JOB_STATUSES: Final = (JobStatus.VALIDATING, JobStatus.IN_PROGRESS, JobStatus.CANCELLING)
PAUSABLE_JOB_STATUSES: Final = (JobStatus.VALIDATING, JobStatus.IN_PROGRESS)
CANCELLABLE_JOB_STATUSES: Final = (JobStatus.VALIDATING, JobStatus.IN_PROGRESS, JobStatus.FINALIZING)
# Batches that may have files to read or write, and those whose input may still be unread (`validated_at` is NULL).
BATCH_FILE_JOB_STATUSES: Final = (JobStatus.VALIDATING, JobStatus.FINALIZING, JobStatus.CANCELLING)
UNREAD_JOB_STATUSES: Final = (JobStatus.VALIDATING, JobStatus.CANCELLING)

OPEN_REQUEST_STATUSES: Final = (RequestStatus.QUEUED, RequestStatus.RUNNING)
# Requests that ended with an error instead of a result.
ERROR_REQUEST_STATUSES: Final = (RequestStatus.FAILED, RequestStatus.EXPIRED, RequestStatus.CANCELLED)
FINAL_REQUEST_STATUSES: Final = (RequestStatus.COMPLETED, *ERROR_REQUEST_STATUSES)

# writing: not visible yet; deleted: hidden; cleared: hidden, and its bytes are deleted.
FILE_STATUSES: Final = ("writing", "ready", "deleted", "cleared")
UPLOAD_STATUSES: Final = ("pending", "completed", "cancelled")
# Of an event that goes to a webhook: dead after a day of failed attempts.
DELIVERY_STATUSES: Final = ("pending", "delivered", "dead")
