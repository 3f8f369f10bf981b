"""GenerateService: from a client's message to the engine and back, on the event loop.

A request's life here: prepare (validate, tokenise on another thread), submit, wait for the engine's
acceptance, then `started`, deltas, `finished` (call.py). Whatever ends the RPC early (client gone,
deadline, error) releases the request in the engine; that is the `finally` of `open_call`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from coordinator.frontend.availability import Availability
from coordinator.frontend.call import Call
from coordinator.frontend.callers import Callers
from coordinator.frontend.engine_link import EngineLink
from coordinator.frontend.errors import SlowClient
from coordinator.frontend.request_preparer import (
    CallClock,
    Dialect,
    RequestPreparer,
    check_request_id,
)
from coordinator.frontend.services import GENERATE_SERVICE, Method, service_handler
from coordinator.frontend.slow_clients import SlowClientWatch
from coordinator.frontend.tracing import RequestSpan, Tracer
from coordinator.frontend.trailing_metadata import frontend_metadata
from coordinator.frontend.unary_answer import UnaryAnswer
from protos.lockstep.v1 import generate_pb2

_ABORT_TIMEOUT_S = 10.0
_GENERATE = f"{GENERATE_SERVICE.full_name}/Generate"
_GENERATE_UNARY = f"{GENERATE_SERVICE.full_name}/GenerateUnary"
_LOCKSTEP = Dialect()


class GenerateService:
    """The five calls. One instance a frontend; all methods run on its event loop."""

    def __init__(
        self,
        link: EngineLink,
        availability: Availability,
        preparer: RequestPreparer,
        model: generate_pb2.GetModelInfoResponse,
        slow_clients: SlowClientWatch,
        callers: Callers,
        tracer: Tracer | None = None,
    ) -> None:
        self._link = link
        self._availability = availability
        self._preparer = preparer
        self._model = model
        self._slow_clients = slow_clients
        self._callers = callers
        self._tracer = tracer
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def handler(self) -> grpc.ServiceRpcHandler:
        """What a server is given to serve these calls."""
        methods: dict[str, Method] = {
            "Generate": self.generate,
            "GenerateUnary": self.generate_unary,
            "Abort": self.abort,
            "GetModelInfo": self.get_model_info,
            "GetServerInfo": self.get_server_info,
        }
        return service_handler(GENERATE_SERVICE, methods, self._link.report_rejected)

    async def wait_until_idle(self) -> None:
        """Returns when no Generate or GenerateUnary call is in progress."""
        await self._idle.wait()

    async def generate(self, request: generate_pb2.GenerateRequest, context: Any) -> None:
        """Streams events as fast as the client takes them; what queues meanwhile is joined."""
        async with (
            self.open_call(_GENERATE, request, context) as call,
            self._slow_clients.watch(call.streams),
        ):
            while not call.is_done:
                for event in await call.next_events():
                    await context.write(event)

    async def generate_unary(
        self, request: generate_pb2.GenerateUnaryRequest, context: Any
    ) -> generate_pb2.GenerateUnaryResponse:
        """The same events, joined."""
        async with self.open_call(_GENERATE_UNARY, request.request, context) as call:
            answer = UnaryAnswer(call.num_samples)
            while not call.is_done:
                for event in await call.next_events():
                    answer.add(event)
        return answer.response(call.cached_token_count)

    async def abort(
        self, request: generate_pb2.AbortRequest, context: Any
    ) -> generate_pb2.AbortResponse:
        """Asks the engine, which knows the requests of every frontend."""
        check_request_id(request.request_id)
        tenant = self._callers.tenant(context, request.tenant)
        was_active = await self._link.abort(request.request_id, _ABORT_TIMEOUT_S, tenant)
        return generate_pb2.AbortResponse(was_active=was_active)

    async def get_model_info(
        self, request: generate_pb2.GetModelInfoRequest, context: Any
    ) -> generate_pb2.GetModelInfoResponse:
        """What the model can take; limits that depend on the group are 0 until it is known."""
        response = generate_pb2.GetModelInfoResponse()
        response.CopyFrom(self._model)
        response.max_model_len = self._availability.max_model_len
        response.vocab_size = self._availability.vocab_size
        return response

    async def get_server_info(
        self, request: generate_pb2.GetServerInfoRequest, context: Any
    ) -> generate_pb2.GetServerInfoResponse:
        """The engine's last report, at most a second old."""
        return self._availability.server_response

    @contextlib.asynccontextmanager
    async def open_call(
        self,
        method: str,
        request: generate_pb2.GenerateRequest,
        context: Any,
        dialect: Dialect = _LOCKSTEP,
    ) -> AsyncIterator[Call]:
        """One call in the engine, for the length of the block; what still runs then is released.

        `method` is its full name, package.Service/Method.
        Trailing metadata say where the time went, however it ends.
        """
        with self._counted_call(), self._span(method, context) as span:
            clock = _clock(context)
            request.tenant = self._callers.tenant(context, request.tenant)
            self._availability.require_ready()
            prepared = await self._preparer.prepare(request, clock, dialect)
            self._availability.require_ready()  # it may have changed while we tokenised
            call = Call(prepared, self._link)
            if span is not None:
                span.prepared(call.started, call.num_samples)
            frontend_s = time.monotonic() - clock.arrival_time
            is_slow = False
            try:
                yield call
                await call.wait_for_times()
            except SlowClient:
                is_slow = True
                raise
            finally:
                is_late = context.time_remaining() == 0
                call.close("slow_client" if is_slow else "deadline" if is_late else "cancelled")
                metadata = (*frontend_metadata(frontend_s), *call.metadata())
                if span is not None:
                    span.ended(call.times, call.num_output_tokens)
                    metadata += (("traceparent", span.traceparent),)
                context.set_trailing_metadata(metadata)

    def _span(
        self, method: str, context: Any
    ) -> contextlib.AbstractContextManager[RequestSpan | None]:
        """The call's span; None where no tracing is configured."""
        if self._tracer is None:
            return contextlib.nullcontext()
        return self._tracer.request(method, context.invocation_metadata())

    @contextlib.contextmanager
    def _counted_call(self) -> Iterator[None]:
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._idle.set()


def _clock(context: Any) -> CallClock:
    now, remaining = time.monotonic(), context.time_remaining()
    return CallClock(arrival_time=now, deadline=0.0 if remaining is None else now + remaining)
