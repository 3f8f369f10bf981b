"""Spans by OpenTelemetry: one a call, with the moments at which it began to wait, prefill, decode.

Only imported where an endpoint is configured. Attributes follow OpenTelemetry's conventions for
gRPC and for generative AI where those have a name, and are ours otherwise.
"""

import contextlib
import threading
import time
from asyncio import CancelledError
from collections.abc import Iterator

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from coordinator.errors import CoordinatorError
from coordinator.frontend.rejections import rejection_of
from coordinator.frontend.tracing import Metadata
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import engine_pb2, generate_pb2

_EXPORT_TIMEOUT_S = 2.0
_CLOSE_LIMIT_S = 3.0
_TRACE_CONTEXT = TraceContextTextMapPropagator()


def otlp_tracer(endpoint: str, model_name: str) -> "OtelTracer":
    """Sends in batches from a thread of its own; full queues drop spans and say so in the log.

    `endpoint` is http://host:port, or https:// for TLS. The SDK's own OTEL_ variables add headers,
    certificates, a sampler and resource attributes.
    """
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
    return OtelTracer(BatchSpanProcessor(exporter), model_name)


class OtelTracer:
    """A tracer over any span processor. Spans are made on the event loop."""

    def __init__(self, processor: SpanProcessor, model_name: str) -> None:
        resource = Resource.create({"service.name": "lockstep", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("lockstep", __version__)
        self._model_name = model_name

    @contextlib.contextmanager
    def request(self, method: str, metadata: Metadata) -> Iterator["OtelSpan"]:
        """The span of a call, whose parent is the client's if `metadata` names one."""
        service, _, name = method.partition("/")
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            method,
            context=_TRACE_CONTEXT.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": name,
                "gen_ai.operation.name": "generate_content",
                "gen_ai.request.model": self._model_name,
            },
        )
        try:
            yield OtelSpan(span)
            span.set_attribute("rpc.grpc.status_code", 0)
        except CoordinatorError as error:
            status = rejection_of(error).status
            span.set_attribute("rpc.grpc.status_code", status.value[0])
            span.set_status(Status(StatusCode.ERROR, f"{status.name}: {error}"))
            raise
        except CancelledError:
            # The client has gone, or its deadline passed: gRPC cancels the call's task.
            span.set_attribute("lockstep.cancelled", True)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Sends what is left; a collector that does not answer is given up after three seconds."""
        closing = threading.Thread(
            target=self._provider.shutdown, name="tracer shutdown", daemon=True
        )
        closing.start()
        closing.join(_CLOSE_LIMIT_S)


class OtelSpan:
    """One call's span."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._began_ns = time.time_ns()

    @property
    def traceparent(self) -> str:
        """This span as W3C Trace Context writes it, for the client."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def prepared(self, started: generate_pb2.Started, num_samples: int) -> None:
        """The request goes to the engine."""
        self._span.set_attributes(
            {
                "lockstep.request_id": started.request_id,
                "lockstep.samples": num_samples,
                "gen_ai.usage.input_tokens": started.prompt_token_count,
            }
        )

    def ended(self, times: engine_pb2.RequestTimes | None, num_output_tokens: int) -> None:
        """Adds what the engine says of the call's time, as events at the moments it names."""
        self._span.set_attribute("gen_ai.usage.output_tokens", num_output_tokens)
        if times is None:
            return
        self._span.set_attributes(
            {
                "lockstep.epoch": times.epoch,
                "lockstep.steps": times.step_count,
                "lockstep.preemptions": times.preemption_count,
                "lockstep.cached_tokens": times.cached_token_count,
            }
        )
        self._event("queue", 0.0)
        if times.prefill_seconds or times.step_count:
            self._event("prefill", times.queue_seconds)
        if times.prefill_seconds:
            self._event("decode", times.queue_seconds + times.prefill_seconds)

    def _event(self, name: str, after_s: float) -> None:
        self._span.add_event(name, timestamp=self._began_ns + round(after_s * 1e9))
