"""What a frontend tells a tracer of each call, and where the tracer comes from.

Nothing here imports OpenTelemetry: without --otlp-endpoint there is no tracer and no call is asked.
"""

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from coordinator.frontend.errors import TracingUnavailable
from protos.lockstep.v1 import engine_pb2, generate_pb2

Metadata = Sequence[tuple[str, str | bytes]]


class RequestSpan(Protocol):
    """The span of one call. For one task."""

    @property
    def traceparent(self) -> str:
        """This span as W3C Trace Context writes it, for the client."""
        ...

    def prepared(self, started: generate_pb2.Started, num_samples: int) -> None:
        """The request goes to the engine; `started` is what its client will be told."""
        ...

    def ended(self, times: engine_pb2.RequestTimes | None, num_output_tokens: int) -> None:
        """The call is over; `times` is None where the engine did not say."""
        ...


class Tracer(Protocol):
    """Makes a span a call."""

    def request(self, method: str, metadata: Metadata) -> AbstractContextManager[RequestSpan]:
        """The span of a call to `method` (package.Service/Method), ended by the block.

        What the block raises becomes its status.
        `metadata` may hold the client's own span (traceparent, tracestate), which is the parent.
        """
        ...

    def close(self) -> None:
        """Sends what is left, within a few seconds."""
        ...


def make_tracer(endpoint: str, model_name: str) -> Tracer | None:
    """A tracer that sends to an OTLP collector by gRPC; None for no endpoint.

    Raises TracingUnavailable if OpenTelemetry is not installed.
    """
    if not endpoint:
        return None
    try:
        otel = importlib.import_module("coordinator.frontend.otel_tracer")
    except ModuleNotFoundError as error:
        raise TracingUnavailable(
            f"--otlp-endpoint is {endpoint!r}, but {error.name} is not installed: "
            "pip install 'lockstep[tracing]', or leave the setting out"
        ) from None
    tracer: Tracer = otel.otlp_tracer(endpoint, model_name)
    return tracer
