"""Run the request loop in the request process: pause while the database is away, hand back at the end."""

from __future__ import annotations

import logging
import random
import time

from jobs.errors import DatabaseUnavailable
from jobs.logs import log_to_stderr
from jobs.streaming.pubsub import Publisher
from jobs.tracing import start_tracing, stop_tracing
from storage.session import DATABASE_UNAVAILABLE, LONG_STATEMENT_TIMEOUT_S, Database
from worker.serving.channel import SocketChannel
from worker.serving.garbage import exempt_loaded_objects
from worker.serving.messages import Setup
from worker.serving.requests.request_loop import RequestLoop
from worker.serving.requests.sink import Sink

log = logging.getLogger(__name__)

_SETUP_POLL_S = 1.0
_DATABASE_RETRY_S = 2.0
_HAND_BACK_RETRY_S = 0.5


def serve(channel: SocketChannel) -> int:
    """Wait for the `Setup`, then serve until the worker stops or dies; return the exit status."""
    while (setup := channel.receive_first()) is None:
        if channel.closed:
            return 0
        channel.wait(_SETUP_POLL_S)
    assert isinstance(setup, Setup)
    log_to_stderr(setup.settings.log_format)
    start_tracing("basic-worker")
    try:
        return _serve(channel, setup)
    finally:
        stop_tracing()


def _serve(channel: SocketChannel, setup: Setup) -> int:
    settings = setup.settings
    database = Database.open(settings.resolved_database_url, statement_timeout_s=LONG_STATEMENT_TIMEOUT_S)
    publisher = Publisher(settings.redis_url)
    loop = RequestLoop(
        setup.codec.load(),
        Sink(database, publisher.publish, setup.worker_id, settings.lease_s, setup.numerics),
        database,
        channel,
        worker_id=setup.worker_id,
        model=setup.model,
        lease_s=settings.lease_s,
        interval_s=settings.partials_interval_s,
        reserved=setup.reserved,
        ageing_requests=settings.priority_ageing_requests,
        cache_scope=setup.cache_scope,
    )
    exempt_loaded_objects()
    while loop.hand_back_s is None:
        if channel.closed:  # the worker is dead: others continue when its leases expire
            return 0
        try:
            loop.admit()
            channel.wait(loop.wait_s)
            loop.collect()
        except DatabaseUnavailable as error:
            log.warning("Decoding is paused: %s", error, extra={"action": "database_away"})
            time.sleep(_DATABASE_RETRY_S * random.uniform(0.5, 1.5))
    handed_back = _hand_back(loop, loop.hand_back_s)
    publisher.close()
    database.dispose()
    return 0 if handed_back else 1


def _hand_back(loop: RequestLoop, timeout_s: float) -> bool:
    """Release all requests; retry while the database is away and there is time left."""
    ends_at = time.monotonic() + timeout_s
    while True:
        try:
            loop.hand_back()
        except (DatabaseUnavailable, *DATABASE_UNAVAILABLE) as error:
            if time.monotonic() > ends_at:
                log.warning("Could not release requests; their leases will expire: %s", error, extra={"action": "stop"})
                return False
            time.sleep(_HAND_BACK_RETRY_S)
        else:
            return True
