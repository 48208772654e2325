"""Trace a job from its submission to its outputs with OpenTelemetry, across processes.

Messages and the column `jobs.traceparent` carry a W3C `traceparent`, so that all processes write to one trace. Without
OTEL_EXPORTER_OTLP_ENDPOINT, OpenTelemetry is not imported and nothing is traced. Configure headers, sampling and
resources with OpenTelemetry's own environment variables.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

TRACEPARENT: Final = "traceparent"  # header of HTTP calls and of Celery messages
_SHAPE: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PREFIX: Final = "basic."  # of attribute names
_STOP_S: Final = 3.0  # time to send the remaining spans at exit

_provider: TracerProvider | None = None  # one per process, like log handlers


def start_tracing(service: str) -> None:
    """Send the spans of this process to the collector in the environment, if there is one."""
    global _provider
    if _provider is not None or not any(os.environ.get(name) for name in _ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        log.warning(
            "Can't trace: %s is not installed; run: pip install 'basic-batch[otel]'",
            exc.name,
            extra={"action": "tracing_missing"},
        )
        return
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    _provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    atexit.register(stop_tracing)


def stop_tracing() -> None:
    """Send the remaining spans, for at most _STOP_S, and stop tracing."""
    global _provider
    if _provider is None:
        return
    # In a daemon thread: if the collector is down, the library would retry for half a minute.
    sending = threading.Thread(target=_provider.shutdown, name="basic-tracing", daemon=True)
    sending.start()
    sending.join(_STOP_S)
    _provider = None


def tracing() -> bool:
    """Return whether this process sends spans."""
    return _provider is not None


@contextmanager
def span(name: str, parent: str | None = None, **attributes: Any) -> Iterator[str | None]:
    """Trace the block as a span; yield its traceparent, or `parent` if tracing is off."""
    if _provider is None:
        yield parent
        return
    with _provider.get_tracer("basic").start_as_current_span(
        name, _context(parent), attributes=_named(attributes)
    ) as started:
        yield _traceparent(started)


def submit_span(headers: Mapping[str, str]) -> AbstractContextManager[str | None]:
    """Trace a submission over HTTP, as a child of the caller's span, if the headers name one."""
    return span("submit", as_traceparent(headers.get(TRACEPARENT)))


def record_span(name: str, parent: str | None, began_at: float, ended_at: float, **attributes: Any) -> str | None:
    """Add a span for an interval that has ended (Unix times, seconds); return its traceparent."""
    if _provider is None:
        return parent
    tracer = _provider.get_tracer("basic")
    started = tracer.start_span(name, _context(parent), attributes=_named(attributes), start_time=_ns(began_at))
    started.end(_ns(ended_at))
    return _traceparent(started)


def as_traceparent(text: str | None) -> str | None:
    """Return the text if it is a valid `traceparent`, else None."""
    return text if text is not None and _SHAPE.fullmatch(text) else None


def _context(parent: str | None) -> Context | None:
    """Return the context of a parent; None: the current context."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return None if parent is None else TraceContextTextMapPropagator().extract({TRACEPARENT: parent})


def _traceparent(started: Span) -> str:
    context = started.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {_PREFIX + name: value for name, value in attributes.items() if value is not None}


def _ns(at: float) -> int:
    return int(at * 1e9)
