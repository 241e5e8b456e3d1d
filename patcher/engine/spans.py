"""OpenTelemetry spans of a change, where vLLM traces (``--otlp-traces-endpoint``).

vLLM makes its tracer provider the process's own (``vllm/tracing/otel.py``, 0.32), so that what is
traced here goes where vLLM's spans go. Without a provider, or the package, nothing is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

try:
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # vLLM makes it optional
    trace = None  # type: ignore[assignment]


@contextmanager
def caller(headers: Mapping[str, str]) -> Iterator[None]:
    """Within it spans belong to the trace that a request's ``traceparent`` names."""
    if trace is None:
        yield
        return
    token = context.attach(TraceContextTextMapPropagator().extract(headers))
    try:
        yield
    finally:
        context.detach(token)


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """A span ``patcher.<name>`` of what is done within it; an error marks it, by its type alone."""
    if trace is None:
        yield
        return
    told = {f"patcher.{key}": value for key, value in attributes.items()}
    tracer = trace.get_tracer("patcher")
    # Not the exception itself: its message may tell more than a trace should.
    with tracer.start_as_current_span(
        f"patcher.{name}", attributes=told, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield
        except BaseException as error:
            current.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise


def tell(**attributes: str | int | float) -> None:
    """Add to the span under way."""
    if trace is not None:
        trace.get_current_span().set_attributes({f"patcher.{k}": v for k, v in attributes.items()})
