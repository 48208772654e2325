"""Erase deleted jobs, and delete prompts, outputs, steps and files that are older than their rules allow.

Every API server runs a pruner; one of them is the leader. It works in small transactions with pauses as long as each,
so that serving continues, and what is interrupted continues in the next round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, Final

import redis
from redis.exceptions import RedisError

from jobs.settings import JobsSettings
from jobs.upkeep.rounds import Leadership, Rounds
from storage import erasure, webhooks
from storage.prune import Ages, Kept, paced, prune
from storage.session import Database

log = logging.getLogger(__name__)

ROLE: Final = "pruner"

_ROUND_S: Final = 10.0
_TERM_S: Final = 60.0
_AGES_EVERY_S: Final = 600.0
_DELIVERIES_KEPT_S: Final = 30 * 86_400.0
_DELIVERIES_AT_ONCE: Final = 500
_REWRITE_EVERY_S: Final = 600.0
_REDIS_TIMEOUT_S: Final = 2.0
_DAY_S: Final = 86_400.0


class Pruner:
    """Runs rounds in a thread of its own, as leader or not."""

    def __init__(self, database: Database, settings: JobsSettings) -> None:
        self._database = database
        self._settings = settings
        self._leadership = Leadership(database, ROLE, _TERM_S)
        self._rounds = Rounds("pruner", self.run_once, lambda: _ROUND_S, log)
        self._aged_at = float("-inf")
        self._rewritten_at = float("-inf")
        self._forgotten = True  # nothing was deleted since the last `forget_deleted`

    def start(self) -> None:
        """Start the thread."""
        self._rounds.start()

    def stop(self) -> None:
        """Stop the thread after its transaction, and resign as leader."""
        self._rounds.stop(_REDIS_TIMEOUT_S)
        self._leadership.resign()

    def run_once(self) -> bool:
        """Erase and prune what is due; return whether we lead. Raise what DATABASE_UNAVAILABLE names."""
        if not self._elected():
            return False
        self._erase()
        if time.monotonic() - self._aged_at > _AGES_EVERY_S:
            self._prune()
            self._aged_at = time.monotonic()
        if not self._forgotten:
            self._forgotten = erasure.forget_deleted(self._database)
        return True

    def _elected(self) -> bool:
        with self._database.write() as session:
            return self._leadership.elect(session)

    def _erase(self) -> None:
        with self._database.read() as session:
            job_ids = erasure.hidden_jobs(session)
        for job_id in job_ids:
            requests = sum(self._paced(erasure.erase_job(self._database, job_id)))
            if self._rounds.stopping.is_set():
                return
            log.info("Erased job %s", job_id, extra={"action": "erased", "job_id": job_id, "requests": requests})
        if job_ids:
            self._rewrite_redis_log()

    def _prune(self) -> None:
        deleted: dict[str, int] = {}
        for kept, count in self._paced(prune(self._database, ages_of(self._settings))):
            deleted[kept] = deleted.get(kept, 0) + count
        for kept, count in deleted.items():
            if count:
                self._forgotten = False
                log.info("Deleted %d %s because of their age", count, kept, extra={"action": "pruned"})
        with self._database.write() as session:
            webhooks.prune_deliveries(session, _DELIVERIES_KEPT_S, _DELIVERIES_AT_ONCE)

    def _paced(self, pieces: Iterator[Any]) -> Iterator[Any]:
        """Yield pieces with pauses until the pruner stops; renew the lease of the leader meanwhile."""
        renewed_at = time.monotonic()
        for piece in paced(pieces, self._rounds.stopping.wait):
            yield piece
            if self._rounds.stopping.is_set():
                return
            if time.monotonic() - renewed_at > _TERM_S / 3:
                self._elected()
                renewed_at = time.monotonic()

    def _rewrite_redis_log(self) -> None:
        """Let Redis rewrite its append-only file: it holds batches that were pushed and have left the queue since."""
        self._forgotten = False
        if time.monotonic() - self._rewritten_at < _REWRITE_EVERY_S:
            return
        self._rewritten_at = time.monotonic()
        try:
            with redis.Redis.from_url(
                self._settings.redis_url, socket_timeout=_REDIS_TIMEOUT_S, socket_connect_timeout=_REDIS_TIMEOUT_S
            ) as client:
                client.bgrewriteaof()
        except RedisError as error:
            about = {"action": "redis_log_kept"}
            log.info("Redis did not rewrite its append-only file: %s", error, extra=about)


def prune_all(database: Database, ages: Ages) -> dict[str, int]:
    """Erase hidden jobs and delete what is older than its age, now; return how much of each."""
    deleted = dict.fromkeys(map(str, Kept), 0)
    with database.read() as session:
        job_ids = erasure.hidden_jobs(session)
    for job_id in job_ids:
        for _ in paced(erasure.erase_job(database, job_id)):
            pass
    for kept, count in paced(prune(database, ages)):
        deleted[kept] += count
    erasure.forget_deleted(database)
    return deleted


def ages_of(settings: JobsSettings) -> Ages:
    """Return the ages of the settings; keys may have their own."""
    return Ages(
        prompts_s=settings.prompt_days * _DAY_S or None,
        outputs_s=settings.output_days * _DAY_S or None,
        steps_s=settings.step_days * _DAY_S or None,
    )
