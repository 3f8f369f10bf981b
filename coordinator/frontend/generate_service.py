"""GenerateService: from a client's message to the engine and back, on the event loop.

A request's life here: prepare (validate, tokenise on another thread), submit, wait for the engine's
acceptance, then `started`, deltas, `finished`. Whatever ends the RPC early (client gone, deadline,
error) releases the request in the engine; that is the `finally` of `_events`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from coordinator.frontend.availability import Availability
from coordinator.frontend.engine_link import EngineLink
from coordinator.frontend.errors import RequestFailed
from coordinator.frontend.rejections import answered
from coordinator.frontend.request_preparer import PreparedRequest, RequestPreparer, check_request_id
from coordinator.frontend.stream import RequestStream
from coordinator.frontend.wire import deserialiser
from protos.lockstep.v1 import generate_pb2

_ABORT_TIMEOUT_S = 10.0
_SERVICE = "lockstep.v1.GenerateService"


class GenerateService:
    """The five calls. One instance a frontend; all methods run on its event loop."""

    def __init__(
        self,
        link: EngineLink,
        availability: Availability,
        preparer: RequestPreparer,
        model: generate_pb2.GetModelInfoResponse,
    ) -> None:
        self._link = link
        self._availability = availability
        self._preparer = preparer
        self._model = model
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server is given to serve these calls."""
        count = self._link.report_rejected
        unary = grpc.unary_unary_rpc_method_handler
        calls: dict[str, tuple[Any, Callable[[Any, Any], Awaitable[Any]]]] = {
            "Generate": (grpc.unary_stream_rpc_method_handler, self.generate),
            "GenerateUnary": (unary, self.generate_unary),
            "Abort": (unary, self.abort),
            "GetModelInfo": (unary, self.get_model_info),
            "GetServerInfo": (unary, self.get_server_info),
        }
        handlers = {
            name: make(
                answered(method, count if name.startswith("Generate") else _count_nothing),
                request_deserializer=deserialiser(getattr(generate_pb2, f"{name}Request")),
                response_serializer=getattr(generate_pb2, f"{name}Response").SerializeToString,
            )
            for name, (make, method) in calls.items()
        }
        return grpc.method_handlers_generic_handler(_SERVICE, handlers)

    async def wait_until_idle(self) -> None:
        """Returns when no Generate or GenerateUnary call is in progress."""
        await self._idle.wait()

    async def generate(self, request: generate_pb2.GenerateRequest, context: Any) -> None:
        """Streams events as fast as the client takes them; what queues meanwhile is joined."""
        async with contextlib.aclosing(self._events(request, context)) as events:
            async for event in events:
                await context.write(event)

    async def generate_unary(
        self, request: generate_pb2.GenerateUnaryRequest, context: Any
    ) -> generate_pb2.GenerateUnaryResponse:
        """The same events, joined."""
        response = generate_pb2.GenerateUnaryResponse()
        texts = []
        async with contextlib.aclosing(self._events(request.request, context)) as events:
            async for event in events:
                if event.HasField("started"):
                    response.started.CopyFrom(event.started)
                elif event.HasField("finished"):
                    response.finished.CopyFrom(event.finished)
                else:
                    texts.append(event.delta.text)
                    response.output.token_ids.extend(event.delta.token_ids)
                    response.output.logprobs.extend(event.delta.logprobs)
        response.output.text = "".join(texts)
        return response

    async def abort(
        self, request: generate_pb2.AbortRequest, context: Any
    ) -> generate_pb2.AbortResponse:
        """Asks the engine, which knows the requests of every frontend."""
        check_request_id(request.request_id)
        was_active = await self._link.abort(request.request_id, _ABORT_TIMEOUT_S)
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

    async def _events(
        self, request: generate_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[generate_pb2.GenerateResponse]:
        """One request's events. Closing it early releases the request."""
        with self._counted_call():
            arrival_time = time.monotonic()
            self._availability.require_ready()
            prepared = await self._preparer.prepare(request, arrival_time)
            if prepared.output.matched_stop is not None:
                # The resumed output already held a stop text: nothing is left to generate.
                yield generate_pb2.GenerateResponse(started=prepared.started)
                yield generate_pb2.GenerateResponse(finished=prepared.output.finished(None))
                return
            self._availability.require_ready()  # it may have changed while we tokenised
            stream = self._link.submit(prepared.submit, prepared.wants_logprobs)
            output = prepared.output
            try:
                async for event in _stream_events(prepared, stream):
                    if event.HasField("finished"):
                        # Ends what a stop text cuts off; nothing after the engine's own end.
                        self._link.release(stream, "stop", output.num_output_tokens)
                    yield event
            finally:
                reason = "deadline" if context.time_remaining() == 0 else "cancelled"
                self._link.release(stream, reason, output.num_output_tokens)

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


async def _stream_events(
    prepared: PreparedRequest, stream: RequestStream
) -> AsyncGenerator[generate_pb2.GenerateResponse]:
    """`started` at the engine's first word, deltas, `finished`.

    Raises RequestFailed, EngineLost.
    """
    is_started = False
    while True:
        update = await stream.take()
        ended = update.ended
        is_failed = ended is not None and ended.status_code != 0
        if not is_started and not (is_failed and not update.token_ids):
            is_started = True
            yield generate_pb2.GenerateResponse(started=prepared.started)
        delta = prepared.output.push(update)
        if delta is not None:
            yield generate_pb2.GenerateResponse(delta=delta)
        if prepared.output.matched_stop is not None or (ended is not None and not is_failed):
            yield generate_pb2.GenerateResponse(finished=prepared.output.finished(ended))
            return
        if ended is not None:
            raise RequestFailed(ended.status_code, ended.status_message, ended.retry_after_seconds)


def _count_nothing(reason: str) -> None:
    """Bad Abort and info calls are not refused requests."""
