"""Where the time of each request went."""

from coordinator.metrics import EngineMetrics
from coordinator.request import Request
from protos.lockstep.v1 import engine_pb2


class TimeKeeper:
    """Sums over the steps of one epoch, and what a request's share of them says about it.

    A step costs two additions, whatever its rows: a request remembers the sums as they were when it
    began. So its communication share is that of all steps reported between its first chunk and its
    end, some of which it may have spent preempted. Times are of CLOCK_MONOTONIC, in seconds.
    """

    def __init__(self, epoch: int, metrics: EngineMetrics) -> None:
        self._epoch = epoch
        self._metrics = metrics
        self._step_micros = 0
        self._comm_micros = 0
        self._last_comm_micros: int | None = None  # as rank 0 counts; None: no step yet
        self._is_comm_measured = False

    def step_reported(self, step_micros: int, comm_micros: int) -> None:
        """Rank 0's time of a step, and its time in collectives so far; -1: not measured."""
        # The first report says where its count stands, not how much of it is of this epoch.
        if self._last_comm_micros is not None:
            self._step_micros += step_micros
            self._comm_micros += comm_micros - self._last_comm_micros
        self._last_comm_micros = comm_micros
        self._is_comm_measured = comm_micros >= 0

    def began(self, request: Request, now: float) -> None:
        """A chunk of a request that had no slot is being sent."""
        if not request.first_chunk_time:
            request.first_chunk_time = now
            request.sums_at_first_chunk = (self._step_micros, self._comm_micros)

    def ended(self, request: Request, now: float) -> engine_pb2.RequestTimes:
        """Counts a request that ends now and returns its times."""
        metrics, times = self._metrics, self._times(request, now)
        num_generated = len(request.output_ids) - request.num_resumed
        metrics.request_prompt_tokens.observe_one(request.prompt_len)
        metrics.request_generation_tokens.observe_one(num_generated)
        if request.first_chunk_time:
            metrics.request_queue_time.observe_one(times.queue_seconds)
            metrics.request_inference_time.observe_one(now - request.first_chunk_time)
        if request.first_token_time:
            metrics.request_prefill_time.observe_one(times.prefill_seconds)
            metrics.request_decode_time.observe_one(times.decode_seconds)
        if num_generated > 1:
            per_token = times.decode_seconds / (num_generated - 1)
            metrics.time_per_output_token.observe_one(per_token)
        return times

    def _times(self, request: Request, now: float) -> engine_pb2.RequestTimes:
        first_chunk = request.first_chunk_time or now
        first_token = request.first_token_time
        return engine_pb2.RequestTimes(
            queue_seconds=max(first_chunk - request.arrival_time, 0.0),
            prefill_seconds=first_token - first_chunk if first_token else 0.0,
            decode_seconds=now - first_token if first_token else 0.0,
            comm_share=self._comm_share(request),
            step_count=request.num_steps,
            preemption_count=request.num_preemptions,
            cached_token_count=request.num_cached_tokens,
            epoch=self._epoch,
        )

    def _comm_share(self, request: Request) -> float:
        step_micros = self._step_micros - request.sums_at_first_chunk[0]
        comm_micros = self._comm_micros - request.sums_at_first_chunk[1]
        if not self._is_comm_measured or not request.first_chunk_time or step_micros <= 0:
            return -1.0
        return min(comm_micros / step_micros, 1.0)
