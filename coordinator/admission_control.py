"""May a request wait here? Bounds of the queue, and deadlines that could not be met."""

import math
from dataclasses import dataclass

import grpc

from coordinator.admission import Refused
from coordinator.batch import Batch
from coordinator.prediction import Load, Predictor
from coordinator.request import Request
from coordinator.request_queue import Ahead

_UNKNOWN_RETRY_AFTER_S = 1.0  # nothing has been measured yet
_MIN_RETRY_AFTER_S = 0.05
_MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True)
class QueueLimits:
    """What may wait: requests, their prompt tokens, and seconds foreseen in the queue (0: any)."""

    max_requests: int
    max_prompt_tokens: int = 1 << 20
    max_time_s: float = 0.0


class AdmissionControl:
    """Refuses with RESOURCE_EXHAUSTED and the time after which to try again, as predicted.

    Of one epoch. Times are of CLOCK_MONOTONIC, in seconds.
    """

    def __init__(self, batch: Batch, limits: QueueLimits) -> None:
        self.predictor = Predictor(batch.limits.max_batch_tokens)
        self._batch = batch
        self._limits = limits

    def check(self, request: Request, now: float) -> None:
        """Raises Refused if the request may not enter the queue."""
        self._check_bounds(request, now)
        if self._limits.max_time_s:
            self._check_queue_time(request, now)
        if request.deadline:
            self._check_deadline(request, now)

    def time_to_first_token(self, now: float) -> float:
        """Predicted for a request of one token behind everything that waits, seconds."""
        queue = self._batch.queue
        everything = Ahead(len(queue), queue.num_prompt_tokens)
        return self.predictor.time_to_first_token(1, self._load(everything, now))

    def _check_bounds(self, request: Request, now: float) -> None:
        queue = self._batch.queue
        max_requests, max_prompt_tokens = self._limits.max_requests, self._limits.max_prompt_tokens
        if self._batch.num_waiting >= max_requests:
            raise self._queue_full(
                f"the queue is full: {max_requests} requests wait", now, num_requests=1
            )
        # One prompt may always wait, or one that is longer than the bound could never be served.
        num_tokens = queue.num_prompt_tokens + request.prompt_len
        if len(queue) and num_tokens > max_prompt_tokens:
            raise self._queue_full(
                f"the queue is full: {queue.num_prompt_tokens} prompt tokens wait, with the "
                f"{request.prompt_len} of this request there would be more than "
                f"{max_prompt_tokens}",
                now,
                num_tokens=num_tokens - max_prompt_tokens,
            )

    def _queue_full(
        self, message: str, now: float, num_requests: int = 0, num_tokens: int = 0
    ) -> Refused:
        load = self._load(Ahead(0, 0), now)
        seconds = self.predictor.time_to_drain(num_requests, num_tokens, load)
        retry_after_s = _bounded(seconds) if seconds else _UNKNOWN_RETRY_AFTER_S
        return Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full", message, retry_after_s)

    def _check_queue_time(self, request: Request, now: float) -> None:
        """What waits and runs may delay a prompt so much; how long it takes itself is its own."""
        ahead = self._batch.queue.ahead_of(request.tenant, request.order)
        load, predictor = self._load(ahead, now), self.predictor
        alone = Load(num_running=load.num_running)
        predicted_s = predictor.time_to_first_token(request.num_to_prefill, load)
        predicted_s -= predictor.time_to_first_token(request.num_to_prefill, alone)
        limit_s = self._limits.max_time_s
        if predicted_s > limit_s:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "queue_time",
                f"a wait of {predicted_s:.2f} s is predicted, the limit is {limit_s:g} s",
                _bounded(predicted_s - limit_s),
            )

    def _check_deadline(self, request: Request, now: float) -> None:
        left_s = request.deadline - now
        if left_s <= 0:
            raise Refused(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "deadline",
                f"the deadline passed {-left_s:.2f} s before the request could be queued",
            )
        ahead = self._batch.queue.ahead_of(request.tenant, request.order)
        load = self._load(ahead, now)
        predicted_s = self.predictor.time_to_first_token(request.num_to_prefill, load)
        if predicted_s > left_s:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "deadline",
                f"the first token is predicted in {predicted_s:.2f} s, the deadline passes in "
                f"{left_s:.2f} s",
                _bounded(predicted_s - left_s),
            )

    def _load(self, ahead: Ahead, now: float) -> Load:
        batch = self._batch
        num_free_slots = batch.slots.num_free_slots
        place = math.ceil(ahead.num_requests) - num_free_slots
        awaited = batch.nth_to_begin(place) if place >= 0 else None
        num_free_blocks = batch.allocator.num_free_blocks
        num_used_blocks = batch.allocator.num_usable_blocks - num_free_blocks
        return Load(
            num_requests_ahead=ahead.num_requests,
            num_tokens_ahead=ahead.num_tokens + batch.num_tokens_to_prefill,
            num_tokens_sent=batch.num_prompt_tokens_sent,
            num_running=batch.num_running,
            num_free_slots=num_free_slots,
            slot_age_s=now - awaited.first_chunk_time if awaited else 0.0,
            slot_age_steps=awaited.num_steps if awaited else math.inf,
            num_used_positions=num_used_blocks * batch.limits.block_size,
            num_free_positions=num_free_blocks * batch.limits.block_size,
        )


def _bounded(seconds: float) -> float:
    return min(max(seconds, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)
