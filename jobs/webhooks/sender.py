"""Send the outbox of webhooks, in threads of the API server. Several API servers share the work by claims.

A failed delivery is tried again for a day (BASIC_WEBHOOK_RETRY_S): the pauses double, with jitter. Then it is dead: it
stays in the list, and can be queued again by hand.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from typing import Final

from jobs.settings import JobsSettings
from jobs.webhooks.addresses import AddressRules
from jobs.webhooks.request import WebhookEvent, send
from storage import webhooks
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason
from storage.webhooks import Attempt, ClaimedDelivery

log = logging.getLogger(__name__)

_POLL_S: Final = 1.0
_RETRY_S: Final = 3.0  # while the database is unavailable
_MAX_OPEN: Final = 8  # deliveries at once, in one process
_MAX_OPEN_PER_ENDPOINT: Final = 2
_CLAIM_S: Final = 15.0  # beyond the time of an attempt: to resolve names and to write the result
_FIRST_PAUSE_S: Final = 5.0
_LONGEST_PAUSE_S: Final = 3 * 3600.0


class WebhookSender:
    """Claims due deliveries and sends each in a thread of its own."""

    def __init__(self, database: Database, settings: JobsSettings) -> None:
        self._database = database
        self._settings = settings
        self._rules = AddressRules.of(settings.webhook_networks)
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()  # deliveries being sent, by endpoint id
        self._unavailable = ""  # why the database was unavailable in the last round
        self._stop = threading.Event()
        self._freed = threading.Event()  # set when a delivery has ended, and at the end
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        """Start the thread that claims."""
        self._thread.start()

    def stop(self, timeout_s: float = _POLL_S) -> None:
        """Claim nothing more. What is being sent then is sent again, if it does not end in time."""
        self._stop.set()
        self._freed.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def run_once(self) -> int:
        """Start sending what is due, as far as there are free places; return how many. Raise DATABASE_UNAVAILABLE."""
        with self._lock:
            free = _MAX_OPEN - self._open.total()
            busy = [name for name, count in self._open.items() if count >= _MAX_OPEN_PER_ENDPOINT]
        if free <= 0 or not self._is_due():
            return 0
        lease_s = self._settings.webhook_timeout_s + _CLAIM_S
        with self._database.write() as session:
            claimed = webhooks.claim_deliveries(session, free, lease_s, busy=busy)
        for delivery in claimed:
            with self._lock:
                self._open[delivery.endpoint.id] += 1
            threading.Thread(target=self._deliver, args=(delivery,), name="webhook", daemon=True).start()
        return len(claimed)

    def _is_due(self) -> bool:
        with self._database.read() as session:
            return webhooks.is_due(session)

    def _run(self) -> None:
        while not self._stop.is_set():
            pause_s = _POLL_S
            try:
                self._freed.clear()
                self.run_once()
                self._unavailable = ""
            except DATABASE_UNAVAILABLE as error:
                self._log_unavailable(unavailable_reason(error))
                pause_s = _RETRY_S
            except Exception:  # the thread must survive, because nothing restarts it
                log.exception("Sending webhooks failed", extra={"action": "webhooks_failed"})
            self._freed.wait(pause_s)

    def _log_unavailable(self, why: str) -> None:
        """Log why the database is unavailable, once per outage and reason."""
        if why != self._unavailable:
            log.warning("Webhooks wait for the database: %s", why, extra={"action": "database_away"})
        self._unavailable = why

    def _deliver(self, claimed: ClaimedDelivery) -> None:
        try:
            deliver(self._database, claimed, self._rules, self._settings)
        except DATABASE_UNAVAILABLE as error:  # it is sent again when the claim ends
            about = {"action": "database_away"}
            log.warning("The result of a webhook is not stored: %s", unavailable_reason(error), extra=about)
        except Exception:
            log.exception("Sending a webhook failed", extra={"action": "webhooks_failed"})
        finally:
            with self._lock:
                self._open[claimed.endpoint.id] -= 1
            self._freed.set()


def deliver(database: Database, claimed: ClaimedDelivery, rules: AddressRules, settings: JobsSettings) -> None:
    """Send one claimed delivery and store the result."""
    found = claimed.delivery
    event = WebhookEvent(found.id, found.event_type, found.job_id, found.created_at)
    attempt = send(event, claimed.endpoint, rules, claimed.now, settings.webhook_timeout_s)
    with database.write() as session:
        pause_s = retry_pause_s(claimed.now - found.queued_at)
        status = webhooks.record_attempt(session, found, attempt, pause_s, settings.webhook_retry_s)
    if status == "dead":
        _log_dead(claimed, attempt)


def retry_pause_s(age_s: float) -> float:
    """Return the pause before the next attempt of a delivery that was queued `age_s` ago: as long again, with jitter.

    So the pauses double, from 5 seconds to 3 hours.
    """
    return min(max(age_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S) * random.uniform(0.8, 1.2)


def _log_dead(claimed: ClaimedDelivery, attempt: Attempt) -> None:
    log.error(
        "Webhook %s did not take the event %s of %s in %d attempts (%s). List such: basic webhooks deliveries --dead",
        claimed.endpoint.id,
        claimed.delivery.event_type,
        claimed.delivery.job_id,
        claimed.delivery.attempts,
        attempt.error or f"status {attempt.status_code}",
        extra={"action": "webhook_dead", "job_id": claimed.delivery.job_id},
    )
