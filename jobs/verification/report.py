"""The state of a verification, and its report: what was compared, under which numerics, with which result."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, get_args

import jobs
from jobs.messages import JobStatus
from storage import numerics, verifications
from storage.numerics import fingerprints_of
from storage.queries import JobView
from storage.session import Database
from storage.verifications import ComputedText, Verdict, VerifiedRequest

Json = dict[str, Any]

VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)


def verification_state(verification: JobView, database: Database) -> Json:
    """Return a verification: its progress, and once it has ended how many of its requests are equal, by verdict."""
    counts = None
    if JobStatus(verification.status).final:
        with database.read() as session:
            found = verifications.compared(session, verification.id, str(verification.verification_of))
            counts = _counts(Counter(request.verdict for request in found))
    return {**_head(verification), "counts": counts}


def verification_report(verification: JobView, verified: JobView, database: Database) -> Json:
    """Return the report of an ended verification, not signed yet."""
    with database.read() as session:
        requests = list(map(_request, verifications.compared(session, verification.id, verified.id)))
        names = {name for one in requests for name in (*one["numerics"], *one["recomputed_numerics"])}
        parts = {name: found.parts for name in sorted(names) if (found := numerics.find(session, name)) is not None}
    job = {
        "id": verified.id,
        "model": verified.model,
        "endpoint": verified.endpoint,
        "created_at": int(verified.created_at),
        "requests_total": verified.requests_total,
        "requests_completed": verified.requests_completed,
    }
    return {
        **_head(verification),
        "object": "verification_report",
        "version": 1,
        "service": f"basic-batch {jobs.__version__}",
        "job": job,
        "drafts": False,
        "counts": _counts(Counter(one["result"] for one in requests)),
        "numerics": parts,
        "requests": requests,
    }


def _head(verification: JobView) -> Json:
    asked = verification.metadata or {}
    finished = verification.finished_at
    return {
        "id": verification.id,
        "object": "verification",
        "job_id": verification.verification_of,
        "status": verification.status,
        "sample": asked.get("sample"),
        "seed": asked.get("seed"),
        "created_at": int(verification.created_at),
        "finished_at": None if finished is None else int(finished),
        "request_counts": {
            "total": verification.requests_total,
            "completed": verification.requests_completed,
            "failed": verification.requests_failed,
        },
    }


def _counts(counted: Counter[Any]) -> dict[str, int]:
    return {verdict: counted[verdict] for verdict in VERDICTS}


def _request(request: VerifiedRequest) -> Json:
    return {
        "index": request.request_index,
        "custom_id": request.custom_id,
        "result": request.verdict,
        "reason": request.reason,
        "numerics": _names(request.first),
        "recomputed_numerics": _names(request.second),
        "sha256": _digest(request.first),
        "recomputed_sha256": _digest(request.second),
    }


def _names(texts: Sequence[ComputedText]) -> list[str]:
    return list(dict.fromkeys(name for text in texts for name in fingerprints_of(text.numerics or numerics.UNKNOWN)))


def _digest(texts: Sequence[ComputedText]) -> str | None:
    """Return the SHA-256 of the texts and token ids of all choices, as JSON; None: there are none."""
    if not texts:
        return None
    content = [[text.text, text.token_ids, text.finish_reason] for text in texts]
    return hashlib.sha256(json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
