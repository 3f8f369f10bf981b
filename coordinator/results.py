"""What a step reported becomes tokens of requests, endings and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import grpc
import numpy as np

from coordinator.batch import Batch
from coordinator.errors import ProtocolBroken
from coordinator.metrics import EngineMetrics
from coordinator.request import Request, RequestState
from coordinator.request_book import RequestBook
from coordinator.sampling_limits import MAX_LOGPROBS
from coordinator.step_command import unpack_int32
from protos.lockstep.v1 import engine_pb2, generate_pb2, worker_pb2

_FLAG_STOP = 1
_FLAG_NOT_FINITE = 2
_NO_FLAG = bytes(1)


@dataclass(frozen=True)
class Resolved:
    """A result and the requests that its entries speak of, in their order."""

    result: worker_pb2.StepResult
    entries: Sequence[Request]
    token_ids: list[int]
    scored: Sequence[tuple[Request, int, int]]  # as of SentCommand

    @property
    def is_plain(self) -> bool:
        """No request ends before its last granted step."""
        return not any(self.result.flags)

    @property
    def is_simple(self) -> bool:
        """It holds tokens and nothing else."""
        return self.is_plain and not self.result.logprobs and not self.scored


def resolve_result(result: worker_pb2.StepResult, batch: Batch) -> Resolved:
    """Finds what a result speaks of; the step counts as reported from now on.

    Raises ProtocolBroken if the result does not fit what was sent.
    """
    scored = batch.outstanding.next_scored
    entries = batch.resolve(result.command_id, result.step)
    token_ids = unpack_int32(result.token_ids)
    if len(token_ids) != len(entries) or len(result.flags) != len(entries):
        raise ProtocolBroken(
            f"step {result.step} has {len(token_ids)} tokens and {len(result.flags)} flags for "
            f"{len(entries)} entries"
        )
    return Resolved(result, entries, token_ids, scored)


def apply_results(
    come: Sequence[tuple[Resolved, float]], batch: Batch, book: RequestBook, metrics: EngineMetrics
) -> None:
    """Applies results in order, each with the CLOCK_MONOTONIC at which it came, in seconds.

    Those of one command go together where they hold tokens and nothing else: a row costs about as
    much for several tokens as for one.
    """
    for _, group in groupby(come, key=lambda one: (one[0].result.command_id, one[0].is_simple)):
        results = list(group)
        giving = _Giving(batch, book, metrics, results[-1][1])
        if len(results) > 1 and results[0][0].is_simple:
            giving.give_together([resolved for resolved, _ in results])
        else:
            for resolved, _ in results:
                giving.give_one(resolved)
        giving.measure(len(results))


class _Giving:
    """Gives out tokens that came at one moment.

    Tokens of requests that have ended meanwhile are dropped. Raises ProtocolBroken if a request
    should have a token and has none.
    """

    def __init__(self, batch: Batch, book: RequestBook, metrics: EngineMetrics, now: float) -> None:
        self._batch = batch
        self._book = book
        self._metrics = metrics
        self._now = now
        self._first_delays = list[float]()
        self._gaps = list[float]()

    def give_one(self, resolved: Resolved) -> None:
        """All of one step's result."""
        result, entries = resolved.result, resolved.entries
        self._book.step_reported(result)
        if resolved.scored:
            _take_prompt_scores(result, resolved.scored, self._book)
        alternatives = None
        if result.logprobs:
            packed = (result.logprobs, result.top_token_ids, result.top_logprobs)
            alternatives = _Alternatives(*packed, len(entries), result.step)
        self._give(entries, resolved.token_ids, result.flags, result.step, alternatives)

    def give_together(self, command: Sequence[Resolved]) -> None:
        """Simple results of several steps of one command, whose rows are the same."""
        rows = command[-1].entries  # without the final chunks of a first step
        for resolved in command:
            self._book.step_reported(resolved.result)
            first, token_ids = resolved.entries[len(rows) :], resolved.token_ids[len(rows) :]
            self._give(first, token_ids, bytes(len(first)), resolved.result.step)
        news, gaps, now = self._book.outbox.outputs_of, self._gaps, self._now
        more_gaps = [0.0] * (len(command) - 1)
        columns = zip(*(resolved.token_ids[: len(rows)] for resolved in command), strict=True)
        for request, row_ids in zip(rows, columns, strict=True):
            if request.state is RequestState.FINISHED:
                continue
            output_ids = request.output_ids
            if row_ids[-1] < 0 or request.constraint is not None:  # fewer tokens than steps
                for resolved, token_id in zip(command, row_ids, strict=True):
                    self._give([request], [token_id], _NO_FLAG, resolved.result.step)
                continue
            gaps.append(now - request.last_token_time)
            gaps += more_gaps
            request.last_token_time = now
            output_ids += row_ids
            outputs = news[request.frontend]
            outputs.handles.append(request.handle)
            outputs.token_counts.append(len(row_ids))
            outputs.token_ids += row_ids
            if len(output_ids) >= request.max_tokens:
                self._book.finish(request, generate_pb2.FINISH_REASON_LENGTH)

    def _give(
        self,
        entries: Sequence[Request],
        token_ids: Sequence[int],
        all_flags: bytes,
        step: int,
        alternatives: _Alternatives | None = None,
    ) -> None:
        now, book, first_delays, gaps = self._now, self._book, self._first_delays, self._gaps
        # The one loop over all tokens: a call more in it is a call for each token that we serve.
        news = book.outbox.outputs_of
        for index, (request, token_id, flags) in enumerate(
            zip(entries, token_ids, all_flags, strict=True)
        ):
            if request.state is RequestState.FINISHED:
                continue
            if token_id < 0 and not flags and request.constraint is not None:
                continue  # it waits for its next mask
            if token_id < 0 or flags & _FLAG_NOT_FINITE:
                # Nobody is to share what it has computed.
                self._batch.prefix_cache.distrust(request)
                _end_without_token(request, flags, step, book)
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
            outputs.token_counts.append(1)
            outputs.token_ids.append(token_id)
            if alternatives:
                outputs.logprobs += alternatives.of(index, request)
            if flags & _FLAG_STOP:
                book.finish(request, generate_pb2.FINISH_REASON_STOP, token_id)
            elif len(request.output_ids) >= request.max_tokens:
                book.finish(request, generate_pb2.FINISH_REASON_LENGTH)
            elif request.constraint is not None:
                book.took_token(request, token_id)

    def measure(self, num_steps: int) -> None:
        """Counts what was given."""
        metrics = self._metrics
        metrics.steps += num_steps
        metrics.generation_tokens += len(self._first_delays) + len(self._gaps)
        metrics.time_to_first_token.observe(self._first_delays)
        metrics.inter_token_latency.observe(self._gaps)


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


def _take_prompt_scores(
    result: worker_pb2.StepResult, scored: Sequence[tuple[Request, int, int]], book: RequestBook
) -> None:
    """Sends on the log-probabilities of prompts, of each token once."""
    packed = (result.prompt_logprobs, result.prompt_top_token_ids, result.prompt_top_logprobs)
    num_entries = sum(count for _, _, count in scored)
    alternatives = _Alternatives(*packed, num_entries, result.step)
    index = 0
    for request, start, count in scored:
        first, end = start + 1, start + 1 + count
        # After a preemption a prompt is computed again, whose beginning may have been told.
        if request.state is not RequestState.FINISHED and end > request.num_scored:
            known = request.num_scored
            told = range(index + known - first, index + count)
            piece = alternatives.piece(told, request.sampling.num_prompt_logprobs)
            piece.first_position = known
            piece.token_ids = request.prompt_ids[known:end].astype("<i4", copy=False).tobytes()
            book.outbox.add_prompt_piece(request, piece)
            request.num_scored = end
        index += count


class _Alternatives:
    """Log-probabilities of a result: [num_entries] and twice [num_entries, 20]."""

    def __init__(
        self, logprobs: bytes, top_ids: bytes, top_logprobs: bytes, num_entries: int, step: int
    ) -> None:
        self._logprobs = np.frombuffer(logprobs, dtype="<f4")
        ids = np.frombuffer(top_ids, dtype="<i4")
        values = np.frombuffer(top_logprobs, dtype="<f4")
        if len(self._logprobs) != num_entries or len(ids) != len(values):
            raise ProtocolBroken(f"step {step}: log-probabilities do not fit its entries")
        shape = (num_entries, MAX_LOGPROBS)
        if len(ids) not in (0, num_entries * MAX_LOGPROBS):
            raise ProtocolBroken(f"step {step}: {len(ids)} alternatives, not {shape}")
        self._top_ids = ids.reshape(shape) if len(ids) else None
        self._top_logprobs = values.reshape(shape) if len(ids) else None

    def of(self, index: int, request: Request) -> list[generate_pb2.TokenLogprobs]:
        """What a request asked for, one entry; nothing if it asked for nothing."""
        count = request.sampling.num_logprobs
        return [] if count < 0 else [self.entry(index, count)]

    def entry(self, index: int, count: int) -> generate_pb2.TokenLogprobs:
        """One entry with its first `count` alternatives, as clients get it."""
        top_ids: Sequence[int] = []
        top_logprobs: Sequence[float] = []
        if count and self._top_ids is not None and self._top_logprobs is not None:
            top_ids = self._top_ids[index, :count].tolist()
            top_logprobs = self._top_logprobs[index, :count].tolist()
        return generate_pb2.TokenLogprobs(
            logprob=float(self._logprobs[index]),
            top_token_ids=top_ids,
            top_logprobs=top_logprobs,
        )

    def piece(self, indices: range, count: int) -> engine_pb2.PromptPiece:
        """Entries with their first `count` alternatives, packed: a frontend unpacks them."""
        some = slice(indices.start, indices.stop)
        piece = engine_pb2.PromptPiece(logprobs=self._logprobs[some].tobytes())
        if count and self._top_ids is not None and self._top_logprobs is not None:
            piece.top_token_ids = self._top_ids[some, :count].tobytes()
            piece.top_logprobs = self._top_logprobs[some, :count].tobytes()
        return piece
