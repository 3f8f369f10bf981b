"""What a step reported becomes tokens of requests, endings and measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from coordinator.batch import Batch
from coordinator.errors import ProtocolBroken
from coordinator.metrics import EngineMetrics
from coordinator.request import Request, RequestState
from coordinator.request_book import RequestBook
from coordinator.step_command import unpack_int32
from protos.lockstep.v1 import generate_pb2, worker_pb2

_FLAG_STOP = 1
_FLAG_NOT_FINITE = 2
_NUM_ALTERNATIVES = 20


@dataclass(frozen=True)
class Resolved:
    """A result and the requests that its entries speak of, in their order."""

    result: worker_pb2.StepResult
    entries: Sequence[Request]
    token_ids: list[int]

    @property
    def is_plain(self) -> bool:
        """No request ends before its last granted step."""
        return not any(self.result.flags)


def resolve_result(result: worker_pb2.StepResult, batch: Batch) -> Resolved:
    """Finds what a result speaks of; the step counts as reported from now on.

    Raises ProtocolBroken if the result does not fit what was sent.
    """
    entries = batch.resolve(result.command_id, result.step)
    token_ids = unpack_int32(result.token_ids)
    if len(token_ids) != len(entries) or len(result.flags) != len(entries):
        raise ProtocolBroken(
            f"step {result.step} has {len(token_ids)} tokens and {len(result.flags)} flags for "
            f"{len(entries)} entries"
        )
    return Resolved(result, entries, token_ids)


def apply_result(
    resolved: Resolved, batch: Batch, book: RequestBook, metrics: EngineMetrics, now: float
) -> None:
    """Applies a step's result to its requests.

    Tokens of requests that have ended meanwhile are dropped; `now` is CLOCK_MONOTONIC in seconds.
    Raises ProtocolBroken if a request should have a token and has none.
    """
    result, entries = resolved.result, resolved.entries
    book.step_reported(result)
    alternatives = _Alternatives(result, len(entries)) if result.logprobs else None
    first_delays, gaps = list[float](), list[float]()
    # The one loop over all tokens: a call more in it is a call for each token that we serve.
    news = book.outbox.outputs_of
    for index, (request, token_id, flags) in enumerate(
        zip(entries, resolved.token_ids, result.flags, strict=True)
    ):
        if request.state is RequestState.FINISHED:
            continue
        if token_id < 0 and not flags and request.constraint is not None:
            continue  # it waits for its next mask
        if token_id < 0 or flags & _FLAG_NOT_FINITE:
            batch.distrust(request)
            _end_without_token(request, flags, result.step, book)
            continue
        if request.last_token_time:
            gaps.append(now - request.last_token_time)
        else:
            first_delays.append(now - request.arrival_time)
            request.first_token_time = now
        request.last_token_time = now
        request.output_ids.append(token_id)
        outputs = news[request.frontend]
        outputs.handles.append(request.handle)
        outputs.token_ids.append(token_id)
        if alternatives:
            outputs.logprobs += alternatives.of(index, request)
        if flags & _FLAG_STOP:
            book.finish(request, generate_pb2.FINISH_REASON_STOP, token_id)
        elif len(request.output_ids) >= request.max_tokens:
            book.finish(request, generate_pb2.FINISH_REASON_LENGTH)
        elif request.constraint is not None:
            book.took_token(request, token_id)
    metrics.steps += 1
    metrics.generation_tokens += len(first_delays) + len(gaps)
    metrics.time_to_first_token.observe(first_delays)
    metrics.inter_token_latency.observe(gaps)


def _end_without_token(request: Request, flags: int, step: int, book: RequestBook) -> None:
    if not flags & _FLAG_NOT_FINITE:
        raise ProtocolBroken(
            f"step {step} gave request {request.request_id!r} no token within its limit"
        )
    number = len(request.output_ids) + 1
    message = f"the logits of output token {number} were not finite"
    sampling = request.sampling
    if request.constraint is not None or sampling.bad_words or sampling.logit_bias:
        message += ", or biases, bad words and constraint together allow no token"
    book.fail(request, grpc.StatusCode.INTERNAL, message)


class _Alternatives:
    """Log-probabilities of a result: [num_entries] and twice [num_entries, 20]."""

    def __init__(self, result: worker_pb2.StepResult, num_entries: int) -> None:
        self._logprobs = np.frombuffer(result.logprobs, dtype="<f4")
        top_ids = np.frombuffer(result.top_token_ids, dtype="<i4")
        top_logprobs = np.frombuffer(result.top_logprobs, dtype="<f4")
        if len(self._logprobs) != num_entries or len(top_ids) != len(top_logprobs):
            raise ProtocolBroken(f"step {result.step}: log-probabilities do not fit its entries")
        shape = (num_entries, _NUM_ALTERNATIVES)
        if len(top_ids) not in (0, num_entries * _NUM_ALTERNATIVES):
            raise ProtocolBroken(f"step {result.step}: {len(top_ids)} alternatives, not {shape}")
        self._top_ids = top_ids.reshape(shape) if len(top_ids) else None
        self._top_logprobs = top_logprobs.reshape(shape) if len(top_ids) else None

    def of(self, index: int, request: Request) -> list[generate_pb2.TokenLogprobs]:
        """What a request asked for, one entry; nothing if it asked for nothing."""
        count = request.sampling.num_logprobs
        if count < 0:
            return []
        top_ids: Sequence[int] = []
        top_logprobs: Sequence[float] = []
        if count and self._top_ids is not None and self._top_logprobs is not None:
            top_ids = self._top_ids[index, :count].tolist()
            top_logprobs = self._top_logprobs[index, :count].tolist()
        return [
            generate_pb2.TokenLogprobs(
                logprob=float(self._logprobs[index]),
                top_token_ids=top_ids,
                top_logprobs=top_logprobs,
            )
        ]
