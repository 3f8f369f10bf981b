"""Requests in flight by handle and by name, and the one way by which each of them ends."""

import time

import grpc

from coordinator.admission import ModelLimits, Refused, read_submit
from coordinator.batch import Batch
from coordinator.metrics import EngineMetrics
from coordinator.outbox import Outbox
from coordinator.request import Request
from protos.lockstep.v1 import engine_pb2, generate_pb2

_RETRY_AFTER_S = 1.0
_FINISHED_REASONS = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_ABORTED: "abort",
}


class RequestBook:
    """Takes requests in and ends them, each by exactly one Ended or Release.

    `batch` and `limits` are None while the group cannot answer; requests are then refused with
    `cause`. Owned by the event loop.
    """

    def __init__(self, outbox: Outbox, metrics: EngineMetrics, max_queue_requests: int) -> None:
        self.outbox = outbox
        self.metrics = metrics
        self.cause = "starting"
        self._max_queue_requests = max_queue_requests
        self._batch: Batch | None = None
        self._limits: ModelLimits | None = None
        self._by_handle: dict[tuple[int, int], Request] = {}
        self._by_name: dict[str, Request] = {}
        self._num_seen = 0

    @property
    def num_in_flight(self) -> int:
        return len(self._by_handle)

    def open(self, batch: Batch, limits: ModelLimits) -> None:
        """The group can answer: requests go into `batch`."""
        assert not self._by_handle
        self._batch, self._limits, self.cause = batch, limits, ""

    def close(self, cause: str, problem: str) -> None:
        """The group cannot answer: ends every request with UNAVAILABLE `problem`."""
        for request in list(self._by_handle.values()):
            self.fail(request, grpc.StatusCode.UNAVAILABLE, problem, _RETRY_AFTER_S)
        self._batch, self._limits, self.cause = None, None, cause

    def submit(self, frontend: int, submit: engine_pb2.Submit) -> None:
        """Queues a request, or ends it at once with the reason why not."""
        try:
            request = self._admit(frontend, submit)
        except Refused as refusal:
            self.metrics.requests_rejected[refusal.reason] += 1
            self.outbox.add_end(
                frontend,
                _error(submit.handle, refusal.status, str(refusal), refusal.retry_after_s),
            )
            return
        self._by_handle[frontend, request.handle] = request
        self._by_name[request.request_id] = request
        self.metrics.prompt_tokens += request.prompt_len
        self.outbox.accept(request)
        self._end_if_resumed_at_end(request)

    def release(self, frontend: int, release: engine_pb2.Release) -> None:
        """The frontend has what it wants. Unknown handles are requests whose end crossed this."""
        request = self._by_handle.get((frontend, release.handle))
        if request is not None:
            self._forget(request, release.reason)

    def abort(self, frontend: int, abort: engine_pb2.AbortByName) -> None:
        """Ends a request by name with ABORTED and answers whether there was one."""
        request = self._by_name.get(abort.request_id)
        if request is not None:
            self.finish(request, generate_pb2.FINISH_REASON_ABORTED)
        outcome = engine_pb2.AbortOutcome(query=abort.query, was_active=request is not None)
        self.outbox.add_answer(frontend, engine_pb2.EngineMessage(abort_outcome=outcome))

    def take_token(
        self,
        request: Request,
        token_id: int,
        is_stop: bool,
        logprobs: generate_pb2.TokenLogprobs | None,
    ) -> None:
        """Records a generated token; ends the request if it is the last one."""
        request.output_ids.append(token_id)
        self.outbox.add_token(request, token_id, logprobs)
        if is_stop:
            self.finish(request, generate_pb2.FINISH_REASON_STOP, token_id)
        elif len(request.output_ids) >= request.max_tokens:
            self.finish(request, generate_pb2.FINISH_REASON_LENGTH)

    def finish(
        self, request: Request, reason: generate_pb2.FinishReason, stop_token_id: int = 0
    ) -> None:
        """Ends a request well."""
        self.outbox.add_end(
            request.frontend,
            engine_pb2.Ended(
                handle=request.handle, finish_reason=reason, stop_token_id=stop_token_id
            ),
        )
        self._forget(request, _FINISHED_REASONS[reason])

    def fail(
        self,
        request: Request,
        status: grpc.StatusCode,
        message: str,
        retry_after_s: float = 0.0,
    ) -> None:
        """Ends a request in an error."""
        self.outbox.add_end(
            request.frontend, _error(request.handle, status, message, retry_after_s)
        )
        self.metrics.requests_failed[status.name.lower()] += 1
        self._remove(request)

    def _admit(self, frontend: int, submit: engine_pb2.Submit) -> Request:
        if self._batch is None or self._limits is None:
            raise Refused(
                grpc.StatusCode.UNAVAILABLE,
                "not_ready",
                f"not ready: {self.cause}",
                _RETRY_AFTER_S,
            )
        if submit.request_id in self._by_name:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                "duplicate_request_id",
                f"request_id is {submit.request_id!r}; it must differ from those in flight",
            )
        request = read_submit(submit, frontend, self._num_seen, self._limits)
        if self._batch.num_waiting >= self._max_queue_requests:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "queue_full",
                f"the queue is full: {self._max_queue_requests} requests wait",
                _RETRY_AFTER_S,
            )
        self._num_seen += 1
        if submit.group not in (0, submit.handle):
            request.leader = self._by_handle.get((frontend, submit.group))
        self._batch.enqueue(request)
        return request

    def _end_if_resumed_at_end(self, request: Request) -> None:
        """A call that broke between its last token and its last message has nothing left to do."""
        resumed = request.output_ids
        sampling = request.sampling
        if not resumed:
            return
        if resumed[-1] in sampling.stop_ids and len(resumed) > sampling.min_tokens:
            self.finish(request, generate_pb2.FINISH_REASON_STOP, resumed[-1])
        elif len(resumed) >= request.max_tokens:
            self.finish(request, generate_pb2.FINISH_REASON_LENGTH)

    def _forget(self, request: Request, reason: str) -> None:
        self.metrics.request_success[reason] += 1
        self.metrics.e2e_latency.observe([time.monotonic() - request.arrival_time])
        self._remove(request)

    def _remove(self, request: Request) -> None:
        assert self._batch is not None
        self._batch.finish(request)
        del self._by_handle[request.frontend, request.handle]
        del self._by_name[request.request_id]


def _error(
    handle: int, status: grpc.StatusCode, message: str, retry_after_s: float
) -> engine_pb2.Ended:
    return engine_pb2.Ended(
        handle=handle,
        status_code=status.value[0],
        status_message=message,
        retry_after_seconds=retry_after_s,
    )
