"""Spans of a frontend, as a collector gets them over OTLP."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from coordinator.config import otlp_endpoint
from coordinator.frontend.errors import TracingUnavailable
from coordinator.frontend.tracing import make_tracer
from protos.lockstep.v1 import engine_pb2, generate_pb2
from protos.vllm_engine import vllm_engine_pb2
from protos.vllm_engine.vllm_engine_pb2_grpc import VllmEngineStub
from tests.unit.coordinator.frontend.fake_engine import (
    MODEL_NAME,
    serving,
    within,
    write_ids_only_model,
)

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TIMES = engine_pb2.RequestTimes(
    queue_seconds=0.25, prefill_seconds=0.5, decode_seconds=1.0, step_count=4, epoch=3
)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []
        self.resources: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            for part in request.resource_spans:
                self.resources.append(attributes(part.resource.attributes))
                for scope in part.scope_spans:
                    self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_ids_only_model(tmp_path)


@contextlib.contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector = Collector()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield collector, f"http://127.0.0.1:{port}"
        finally:
            server.stop(grace=0).wait(5)


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def request(ids: list[int]) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=ids), request_id="request-7"
    )


def test_a_request_is_one_span_below_the_clients_with_its_phases_as_events(model: Path) -> None:
    async def main(endpoint: str) -> dict[str, str]:
        async with serving(model, otlp_endpoint=endpoint) as served:
            parent = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),)
            call = served.stub.Generate(request([1, 2, 3]), metadata=parent)
            submit = await served.engine.next_submit()
            served.engine.send_outputs({submit.handle: [4, 5]})
            served.engine.end(submit.handle, times=TIMES)
            assert len([event async for event in call]) >= 2
            metadata = await within(call.trailing_metadata())
            return dict(metadata)

    with collecting() as (collector, endpoint):
        metadata = asyncio.run(main(endpoint))
    (span,) = collector.spans
    assert span.name == "lockstep.v1.GenerateService/Generate"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert span.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert span.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    assert metadata["traceparent"] == f"00-{TRACE_ID}-{span.span_id.hex()}-01"
    found = attributes(span.attributes)
    assert found["rpc.service"] == "lockstep.v1.GenerateService"
    assert found["rpc.method"] == "Generate"
    assert found["lockstep.request_id"] == "request-7"
    assert found["gen_ai.request.model"] == MODEL_NAME
    assert found["gen_ai.usage.input_tokens"] == 3
    assert found["lockstep.samples"] == 1
    assert found["gen_ai.usage.output_tokens"] == 2
    assert (found["lockstep.epoch"], found["lockstep.steps"]) == (3, 4)
    assert found["rpc.grpc.status_code"] == 0
    assert [event.name for event in span.events] == ["queue", "prefill", "decode"]
    since = [event.time_unix_nano - span.events[0].time_unix_nano for event in span.events]
    assert since == [0, 250_000_000, 750_000_000]
    assert collector.resources[0]["service.name"] == "lockstep"


def test_a_gateways_call_is_a_span_of_the_service_that_it_speaks(model: Path) -> None:
    async def main(endpoint: str) -> None:
        async with serving(model, otlp_endpoint=endpoint) as served:
            asked = vllm_engine_pb2.GenerateRequest(
                tokenized=vllm_engine_pb2.TokenizedInput(input_ids=[1, 2])
            )
            call = VllmEngineStub(served.channel).Generate(asked)
            submit = await served.engine.next_submit()
            served.engine.send_outputs({submit.handle: [4]})
            served.engine.end(submit.handle, times=TIMES)
            assert [message async for message in call]

    with collecting() as (collector, endpoint):
        asyncio.run(main(endpoint))
    (span,) = collector.spans
    assert span.name == "vllm.grpc.engine.VllmEngine/Generate"
    found = attributes(span.attributes)
    assert (found["rpc.service"], found["rpc.method"]) == (
        "vllm.grpc.engine.VllmEngine",
        "Generate",
    )


def test_a_refused_request_and_one_that_is_cancelled_are_spans_too(model: Path) -> None:
    async def main(endpoint: str) -> None:
        async with serving(model, otlp_endpoint=endpoint) as served:
            with pytest.raises(grpc.aio.AioRpcError):
                await within(anext(aiter(served.stub.Generate(request([])))))
            call = served.stub.Generate(request([1]))
            submit = await served.engine.next_submit()
            served.engine.accept(submit.handle)
            await within(anext(aiter(call)))
            call.cancel()
            await served.engine.next_release()

    with collecting() as (collector, endpoint):
        asyncio.run(main(endpoint))
    refused, cancelled = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    assert refused.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert refused.status.message.startswith("INVALID_ARGUMENT: ")
    assert not refused.parent_span_id
    assert attributes(cancelled.attributes)["lockstep.cancelled"] is True
    assert not cancelled.events


def test_a_collector_that_does_not_answer_holds_up_neither_requests_nor_the_end(
    model: Path,
) -> None:
    async def main() -> float:
        async with serving(model, otlp_endpoint="http://127.0.0.1:1") as served:
            call = served.stub.Generate(request([1]))
            submit = await served.engine.next_submit()
            served.engine.send_outputs({submit.handle: [4]})
            served.engine.end(submit.handle, times=TIMES)
            assert len([event async for event in call]) >= 2
            return time.monotonic()

    served_at = asyncio.run(main())
    assert time.monotonic() - served_at < 15


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported() -> None:
    assert make_tracer("", "m") is None
    program = (
        "import sys, coordinator.frontend.__main__, coordinator.__main__; "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout == "[]\n"


def test_missing_packages_are_named_with_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coordinator.frontend.otel_tracer", None)
    with pytest.raises(TracingUnavailable, match=r"pip install 'lockstep\[tracing\]'"):
        make_tracer("http://127.0.0.1:4317", "m")


@pytest.mark.parametrize(
    "text", ["127.0.0.1:4317", "http://host", "grpc://host:4317", "http://h:x"]
)
def test_an_endpoint_that_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="want http://host:port"):
        otlp_endpoint(text)
