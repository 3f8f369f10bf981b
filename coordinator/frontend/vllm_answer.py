"""The events of a `lockstep.v1` call -> the messages of a `VllmEngine` one."""

from collections.abc import Callable, Iterator, Sequence

from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2

_FINISH_REASONS = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_ABORTED: "abort",
}


class VllmAnswer:
    """Takes the events of one call with `num_samples` outputs; gives chunks if it `is_stream`."""

    def __init__(self, is_stream: bool, num_samples: int) -> None:
        self._is_stream = is_stream
        self._num_prompt_tokens = 0
        self._completes = [
            vllm_engine_pb2.GenerateComplete(index=index) for index in range(num_samples)
        ]

    def add(self, event: generate_pb2.GenerateResponse) -> vllm_engine_pb2.GenerateResponse | None:
        """Takes the next event; returns what a stream is to send for it, None if nothing."""
        match event.WhichOneof("event"):
            case "started":
                self._num_prompt_tokens = event.started.prompt_token_count
            case "delta" if event.delta.token_ids:
                return self._add_delta(event.delta)
            case "finished":
                _add_finished(self._completes[event.finished.sample_index], event.finished)
        return None

    def completes(
        self, cached_token_count: Callable[[int], int]
    ) -> Iterator[vllm_engine_pb2.GenerateResponse]:
        """The last messages, one an output; `cached_token_count` of a sample is known by now."""
        for index, complete in enumerate(self._completes):
            complete.cached_tokens = cached_token_count(index)
            yield vllm_engine_pb2.GenerateResponse(complete=complete)

    def _add_delta(self, delta: generate_pb2.Delta) -> vllm_engine_pb2.GenerateResponse | None:
        complete = self._completes[delta.sample_index]
        complete.output_ids.extend(delta.token_ids)
        if not self._is_stream:
            if delta.logprobs:
                _add_logprobs(complete.output_logprobs, delta.token_ids, delta.logprobs)
            return None
        chunk = vllm_engine_pb2.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=len(complete.output_ids),
            index=delta.sample_index,
        )
        if delta.logprobs:
            _add_logprobs(chunk.output_logprobs, delta.token_ids, delta.logprobs)
        return vllm_engine_pb2.GenerateResponse(chunk=chunk)


def _add_finished(
    complete: vllm_engine_pb2.GenerateComplete, finished: generate_pb2.Finished
) -> None:
    complete.finish_reason = _FINISH_REASONS[finished.finish_reason]
    complete.prompt_tokens = finished.usage.prompt_token_count
    complete.completion_tokens = finished.usage.output_token_count
    match finished.WhichOneof("matched_stop"):
        case "stop":
            complete.matched_stop_str = finished.stop
        case "stop_token_id":
            complete.matched_token_id = finished.stop_token_id


def _add_logprobs(
    into: vllm_engine_pb2.OutputLogProbs,
    token_ids: Sequence[int],
    entries: Sequence[generate_pb2.TokenLogprobs],
) -> None:
    into.token_ids.extend(token_ids)
    into.token_logprobs.extend(entry.logprob for entry in entries)
    for entry in entries:
        into.top_logprobs.add(values=entry.top_logprobs, token_ids=entry.top_token_ids)
