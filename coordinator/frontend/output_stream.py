"""One request's output as the client sees it: deltas with their log-probabilities, then usage."""

from collections import deque

from coordinator.frontend.output_assembler import OutputAssembler
from coordinator.frontend.stream import StreamUpdate
from protos.lockstep.v1 import engine_pb2, generate_pb2


class OutputStream:
    """Joins the assembler's text with what the engine says beside the ids, for one sample."""

    def __init__(
        self, assembler: OutputAssembler, num_prompt_tokens: int, sample_index: int
    ) -> None:
        self._assembler = assembler
        self._sample_index = sample_index
        self._num_prompt_tokens = num_prompt_tokens
        self._held_logprobs: deque[generate_pb2.TokenLogprobs] = deque()

    @property
    def matched_stop(self) -> str | None:
        """The stop text that ended the output."""
        return self._assembler.matched_stop

    @property
    def num_output_tokens(self) -> int:
        """Ids given to the client, resumed ones included."""
        return self._assembler.num_output_tokens

    def push(self, update: StreamUpdate) -> generate_pb2.Delta | None:
        """Takes new ids; returns what may be sent, None if nothing."""
        self._held_logprobs += update.logprobs
        released = self._assembler.push(update.token_ids, update.ended is not None)
        if not released.text and not released.token_ids:
            return None
        delta = generate_pb2.Delta(
            text=released.text, token_ids=released.token_ids, sample_index=self._sample_index
        )
        if self._held_logprobs:
            num_entries = min(len(released.token_ids), len(self._held_logprobs))
            delta.logprobs.extend(self._held_logprobs.popleft() for _ in range(num_entries))
        return delta

    def finished(self, ended: engine_pb2.Ended | None) -> generate_pb2.Finished:
        """The last event; `ended` is the engine's word, None if a stop text came before it."""
        finished = generate_pb2.Finished(
            usage=generate_pb2.Usage(
                prompt_token_count=self._num_prompt_tokens,
                output_token_count=self.num_output_tokens,
                cached_token_count=0 if ended is None else ended.times.cached_token_count,
            ),
            sample_index=self._sample_index,
        )
        if self.matched_stop is not None:
            finished.finish_reason = generate_pb2.FINISH_REASON_STOP
            finished.stop = self.matched_stop
            return finished
        assert ended is not None
        finished.finish_reason = ended.finish_reason
        if ended.finish_reason == generate_pb2.FINISH_REASON_STOP:
            finished.stop_token_id = ended.stop_token_id
        return finished
