"""Requests in flight by handle and by name, and the one way by which each of them ends."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from coordinator.admission import ModelLimits, Refused, read_submit
from coordinator.admission_control import AdmissionControl, QueueLimits
from coordinator.batch import Batch
from coordinator.client_count import ClientCount
from coordinator.constraints import Constraints
from coordinator.deadlines import Deadlines
from coordinator.metrics import EngineMetrics
from coordinator.outbox import Outbox
from coordinator.precedence import Precedence
from coordinator.request import Request
from coordinator.time_keeper import TimeKeeper
from protos.lockstep.v1 import engine_pb2, generate_pb2, grammar_pb2, worker_pb2

_LOG = logging.getLogger(__name__)
_RETRY_AFTER_S = 1.0
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
_FINISHED_REASONS = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_ABORTED: "abort",
}


@dataclass(frozen=True)
class _Epoch:
    """What the book has while the group can answer."""

    batch: Batch
    limits: ModelLimits
    control: AdmissionControl
    keeper: TimeKeeper


class RequestBook:
    """Takes requests in and ends them, each by exactly one Ended.

    The samples of one call are requests of their own that share a name and a group.
    `clock` gives CLOCK_MONOTONIC in seconds. Until `open` and after `close` the group cannot answer
    and requests are refused with `cause`. Owned by the event loop.
    """

    def __init__(
        self,
        outbox: Outbox,
        metrics: EngineMetrics,
        queue_limits: QueueLimits,
        constraints: Constraints,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outbox = outbox
        self.metrics = metrics
        self.cause = "starting"
        self._queue_limits = queue_limits
        self._clock = clock
        self._constraints = constraints
        self._epoch: _Epoch | None = None
        self._by_handle: dict[tuple[int, int], Request] = {}
        # By tenant and request id: nobody can take, or abort, another tenant's.
        self._by_name: dict[tuple[str, str], list[Request]] = {}
        self._precedence = Precedence()
        self._deadlines = Deadlines()
        self._clients = ClientCount()

    @property
    def batch(self) -> Batch | None:
        """Where requests go; None while the group cannot answer."""
        return self._epoch.batch if self._epoch else None

    @property
    def _epoch_number(self) -> int:
        return self._epoch.batch.epoch if self._epoch else 0

    @property
    def num_in_flight(self) -> int:
        return len(self._by_handle)

    def open(self, batch: Batch, limits: ModelLimits) -> None:
        """The group can answer: requests go into `batch`."""
        assert not self._by_handle
        control = AdmissionControl(batch, self._queue_limits)
        keeper = TimeKeeper(batch.epoch, self.metrics)
        self._epoch, self.cause = _Epoch(batch, limits, control, keeper), ""

    def close(self, cause: str, problem: str) -> None:
        """The group cannot answer: ends every request with UNAVAILABLE `problem`."""
        for request in list(self._by_handle.values()):
            self.fail(request, grpc.StatusCode.UNAVAILABLE, problem, _RETRY_AFTER_S)
        self._measure()
        self._epoch, self.cause = None, cause

    def submit(self, frontend: int, submit: engine_pb2.Submit) -> None:
        """Queues a request, or ends it at once with the reason why not."""
        try:
            request = self._admit(frontend, submit)
        except Refused as refusal:
            self.metrics.requests_rejected[refusal.reason] += 1
            self.outbox.add_end(
                frontend,
                _error(
                    submit.handle,
                    refusal.status,
                    str(refusal),
                    refusal.retry_after_s,
                    refusal.field,
                ),
            )
            return
        self._by_handle[frontend, request.handle] = request
        self._by_name.setdefault((request.tenant, request.request_id), []).append(request)
        self._deadlines.add(request)
        self._clients.began(frontend)
        self.metrics.prompt_tokens += request.prompt_len
        if request.constraint is not None and not _ends_resumed(request):
            assert self._epoch is not None
            self._constraints.began(request, self._epoch.limits.vocab_size)
            return
        self.outbox.accept(request)
        self._end_if_resumed_at_end(request)

    def take_mask(self, reply: grammar_pb2.GrammarReply) -> None:
        """A constrained request's next mask, with the first of which it is accepted, or its end."""
        request = self._constraints.take(reply)
        if request is None:
            return
        assert self._epoch is not None
        batch = self._epoch.batch
        if not reply.status_code:
            if batch.mask_came(request):
                self.outbox.accept(request)
            return
        retry_after_s = _RETRY_AFTER_S if reply.status_code == _UNAVAILABLE else 0.0
        status = next(code for code in grpc.StatusCode if code.value[0] == reply.status_code)
        field = _constraint_field(request) if status is grpc.StatusCode.INVALID_ARGUMENT else ""
        if not batch.is_awaiting_first_mask(request):
            self.fail(request, status, reply.status_message, retry_after_s, field)
            return
        self.metrics.requests_rejected[status.name.lower()] += 1
        ended = _error(request.handle, status, reply.status_message, retry_after_s, field)
        self._end(request, ended, self._clock())

    def release(self, frontend: int, release: engine_pb2.Release) -> None:
        """The frontend has what it wants; it hears the request's times.

        Unknown handles are requests whose end crossed this.
        """
        request = self._by_handle.get((frontend, release.handle))
        if request is not None:
            self._end_well(request, engine_pb2.Ended(handle=request.handle), release.reason)

    def abort(self, frontend: int, abort: engine_pb2.AbortByName) -> None:
        """Ends what has this name, all samples of it, with ABORTED; answers if there was any."""
        named = list(self._by_name.get((abort.tenant, abort.request_id), ()))
        for request in named:
            self.finish(request, generate_pb2.FINISH_REASON_ABORTED)
        outcome = engine_pb2.AbortOutcome(query=abort.query, was_active=bool(named))
        self.outbox.add_answer(frontend, engine_pb2.EngineMessage(abort_outcome=outcome))

    def alive(self, frontend: int, num_streams: int) -> None:
        """A frontend holds that many requests, as of all that it has said before."""
        self.metrics.requests_without_client = self._clients.reported(frontend, num_streams)

    def command_sent(self, now: float) -> None:
        """A command goes to the ranks, with the first chunks of what was taken from the queue."""
        assert self._epoch is not None
        for request in self._epoch.batch.queue.pop_taken():
            if not request.first_chunk_time:
                self._epoch.control.predictor.observe_admission(
                    request.num_to_prefill, request.num_cached_tokens
                )
            self._epoch.keeper.began(request, now)

    def step_reported(self, result: worker_pb2.StepResult) -> None:
        """Learns from a step's times, before its tokens are taken."""
        assert self._epoch is not None
        self._epoch.keeper.step_reported(result.step_micros, result.comm_micros)
        num_prompt_tokens = self._epoch.batch.pop_prompt_tokens(result.step)
        self._epoch.control.predictor.observe_step(num_prompt_tokens, result.step_micros / 1e6)

    def tick(self, now: float) -> bool:
        """Called every few tens of milliseconds; True if deadlines have passed and slots closed."""
        if self._epoch is None:
            return False
        batch = self._epoch.batch
        for request in batch.slots.open.values():
            batch.queue.charge_output(request)
        has_ended = self._deadlines.end_passed(now, self.num_in_flight, self._end_late)
        self._measure()
        return has_ended

    def took_token(self, request: Request, token_id: int) -> None:
        """A constrained request has got a token that is not its last: the next mask is wanted."""
        self._constraints.got_token(request, token_id)

    def finish(
        self, request: Request, reason: generate_pb2.FinishReason, stop_token_id: int = 0
    ) -> None:
        """Ends a request well."""
        ended = engine_pb2.Ended(
            handle=request.handle, finish_reason=reason, stop_token_id=stop_token_id
        )
        self._end_well(request, ended, _FINISHED_REASONS[reason])

    def fail(
        self,
        request: Request,
        status: grpc.StatusCode,
        message: str,
        retry_after_s: float = 0.0,
        field: str = "",
    ) -> None:
        """Ends a request in an error; `field` is what is at fault in a bad one."""
        self._log_end(request, f"failed: {status.name}: {message}")
        self.metrics.requests_failed[status.name.lower()] += 1
        ended = _error(request.handle, status, message, retry_after_s, field)
        self._end(request, ended, self._clock())

    def _admit(self, frontend: int, submit: engine_pb2.Submit) -> Request:
        epoch = self._epoch
        if epoch is None:
            raise Refused(
                grpc.StatusCode.UNAVAILABLE,
                "not_ready",
                f"not ready: {self.cause}",
                _RETRY_AFTER_S,
            )
        self._check_name(frontend, submit)
        request = read_submit(submit, frontend, epoch.limits)
        epoch.control.check(request, self._clock())
        request.order = self._precedence.take(request.order)
        if submit.group not in (0, submit.handle):
            request.leader = self._by_handle.get((frontend, submit.group))
        if request.constraint is None:
            epoch.batch.enqueue(request)
        else:
            epoch.batch.await_mask(request)
        return request

    def _check_name(self, frontend: int, submit: engine_pb2.Submit) -> None:
        """Only samples of one call share a name."""
        call = (frontend, submit.group or submit.handle)
        for other in self._by_name.get((submit.tenant, submit.request_id), ()):
            if (other.frontend, other.group) != call:
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "duplicate_request_id",
                    f"request_id is {submit.request_id!r}; it must differ from those in flight",
                    field="request_id",
                )

    def _end_if_resumed_at_end(self, request: Request) -> None:
        """A call that broke between its last token and its last message has nothing left to do."""
        if _ends_at_stop_id(request):
            stop_id = request.output_ids[-1]
            self.finish(request, generate_pb2.FINISH_REASON_STOP, stop_id)
        elif _ends_resumed(request):
            self.finish(request, generate_pb2.FINISH_REASON_LENGTH)

    def _end_late(self, request: Request) -> None:
        """Counts as it does where the frontend is the first to see it: nothing has failed here."""
        message = f"the deadline passed after {len(request.output_ids)} output tokens"
        self._log_end(request, f"ended: {message}")
        late = _error(request.handle, grpc.StatusCode.DEADLINE_EXCEEDED, message, 0.0)
        self._end_well(request, late, "deadline")

    def _log_end(self, request: Request, words: str) -> None:
        fields = {"request_id": request.request_id, "epoch": self._epoch_number}
        _LOG.info("request %s %s", request.request_id, words, extra=fields)

    def _end_well(self, request: Request, ended: engine_pb2.Ended, reason: str) -> None:
        now = self._clock()
        self.metrics.request_success[reason] += 1
        self.metrics.e2e_latency.observe_one(now - request.arrival_time)
        self._end(request, ended, now)

    def _end(self, request: Request, ended: engine_pb2.Ended, now: float) -> None:
        """The one way out: tells the frontend and forgets the request."""
        assert self._epoch is not None
        batch = self._epoch.batch
        ended.times.CopyFrom(self._epoch.keeper.ended(request, now))
        self.outbox.add_end(request.frontend, ended)
        if request.first_chunk_time:
            stay_s = now - request.first_chunk_time
            self._epoch.control.predictor.observe_stay(stay_s, request.num_steps)
        batch.queue.charge_output(request)
        batch.finish(request)
        if request.constraint_key:
            self._constraints.ended(request)
        self._clients.ended(request.frontend)
        self._precedence.give_back(request.order)
        del self._by_handle[request.frontend, request.handle]
        name = (request.tenant, request.request_id)
        named = self._by_name[name]
        named.remove(request)
        if not named:
            del self._by_name[name]

    def _measure(self) -> None:
        if self._epoch is None:
            return
        queue = self._epoch.batch.queue
        self.metrics.queue_prompt_tokens = queue.num_prompt_tokens
        self.metrics.num_tenants_waiting = queue.num_tenants
        self.metrics.predicted_ttft = self._epoch.control.time_to_first_token(self._clock())


def _ends_at_stop_id(request: Request) -> bool:
    resumed, sampling = request.output_ids, request.sampling
    is_stop = bool(resumed) and resumed[-1] in sampling.stop_ids
    return is_stop and len(resumed) > sampling.min_tokens


def _ends_resumed(request: Request) -> bool:
    """What a broken call delivered is the whole output."""
    return _ends_at_stop_id(request) or len(request.output_ids) >= request.max_tokens


def _constraint_field(request: Request) -> str:
    """The field of SamplingParams that holds the constraint; "" without one."""
    constraint = request.constraint
    return "" if constraint is None else constraint.WhichOneof("constraint") or ""


def _error(
    handle: int,
    status: grpc.StatusCode,
    message: str,
    retry_after_s: float,
    field: str = "",
) -> engine_pb2.Ended:
    return engine_pb2.Ended(
        handle=handle,
        status_code=status.value[0],
        status_message=message,
        retry_after_seconds=retry_after_s,
        field=field,
    )
