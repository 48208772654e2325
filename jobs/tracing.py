"""Tracing: spans of a job from its submission to its outputs, sent to an OpenTelemetry collector if one is named.

A span's place is a W3C `traceparent`, which travels with the message and lies in `jobs.traceparent`, so that processes
that never meet write one trace. Where OTEL_EXPORTER_OTLP_ENDPOINT is not set, nothing of OpenTelemetry is imported and
nothing is done. Everything else that can be said (headers, sampling, resource) says OpenTelemetry's own environment.
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

TRACEPARENT: Final = "traceparent"  # its name as a header of HTTP calls and of messages
_SHAPE: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PREFIX: Final = "basic."  # of the names of attributes
_STOP_S: Final = 3.0  # for what is left to send at the end

_provider: TracerProvider | None = None  # of this process, like its log handlers


def start_tracing(service: str) -> None:
    """Send the spans of this process to the collector that the environment names; do nothing if it names none."""
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
            "A trace collector is named, but there is no %s; `pip install 'basic-batch[otel]'` brings it",
            exc.name,
            extra={"action": "tracing_missing"},
        )
        return
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    _provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    atexit.register(stop_tracing)


def stop_tracing() -> None:
    """Send what is left, as far as the time allows, and trace no more."""
    global _provider
    if _provider is None:
        return
    # In a thread that nobody need wait for: while the collector is away, the library would try for half a minute.
    sending = threading.Thread(target=_provider.shutdown, name="basic-tracing", daemon=True)
    sending.start()
    sending.join(_STOP_S)
    _provider = None


def tracing() -> bool:
    """Return whether spans of this process go anywhere."""
    return _provider is not None


@contextmanager
def span(name: str, parent: str | None = None, **attributes: Any) -> Iterator[str | None]:
    """Trace what happens within; the value is the place for spans below it, or `parent` where nothing is traced."""
    if _provider is None:
        yield parent
        return
    with _provider.get_tracer("basic").start_as_current_span(
        name, _context(parent), attributes=_named(attributes)
    ) as begun:
        yield _place(begun)


def submit_span(headers: Mapping[str, str]) -> AbstractContextManager[str | None]:
    """Trace a submission over HTTP, below the span of whoever sent it, if there is one."""
    return span("submit", as_traceparent(headers.get(TRACEPARENT)))


def record_span(name: str, parent: str | None, began_at: float, ended_at: float, **attributes: Any) -> str | None:
    """Trace what is over already, by its Unix times; return the place for spans below it."""
    if _provider is None:
        return parent
    tracer = _provider.get_tracer("basic")
    begun = tracer.start_span(name, _context(parent), attributes=_named(attributes), start_time=_ns(began_at))
    begun.end(_ns(ended_at))
    return _place(begun)


def as_traceparent(text: str | None) -> str | None:
    """Return what a stranger sent if it is a `traceparent`; otherwise it counts as not sent."""
    return text if text is not None and _SHAPE.fullmatch(text) else None


def _context(parent: str | None) -> Context | None:
    """Return where a span belongs; None: below the one that is open, if there is one."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return None if parent is None else TraceContextTextMapPropagator().extract({TRACEPARENT: parent})


def _place(begun: Span) -> str:
    place = begun.get_span_context()
    return f"00-{place.trace_id:032x}-{place.span_id:016x}-{int(place.trace_flags):02x}"


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {_PREFIX + name: value for name, value in attributes.items() if value is not None}


def _ns(at: float) -> int:
    return int(at * 1e9)
