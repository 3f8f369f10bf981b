"""What the attempts of one streaming call have delivered, and what the next one is to ask for."""

from collections.abc import Iterable

from lockstep.client.requests import GenerateRequest
from lockstep.client.results import Delta, Finished, PromptLogprobs, Started
from lockstep.client.statuses import failure
from lockstep.client.wire import (
    delta_of,
    finished_of,
    prompt_logprobs_of,
    request_message,
    started_of,
)
from protos.lockstep.v1 import generate_pb2

_TIMES_PREFIX = "lockstep-"


class StreamProgress:
    """One call over all its attempts. No I/O. For one thread."""

    def __init__(self, request: GenerateRequest, may_resume: bool) -> None:
        """Raises TypeError or ValueError for a request that cannot be sent, or not resumed."""
        self._message = request_message(request)
        self._params = self._message.sampling_params
        self._num_samples = self._params.n if self._params.HasField("n") else 1
        if may_resume and self._num_samples > 1:
            raise ValueError(f"n is {self._num_samples}; only a single sample can be resumed")
        self._may_resume = may_resume
        self._has_output = False
        self._prompt_pieces: list[generate_pb2.PromptLogprobs] = []
        self.started: Started | None = None
        self.finished: dict[int, Finished] = {}
        self.times: dict[str, str] = {}

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Those that have come; None if there are none."""
        return prompt_logprobs_of(self._prompt_pieces)

    @property
    def may_retry(self) -> bool:
        """Another attempt would repeat nothing."""
        return self._may_resume or not self._has_output

    @property
    def is_complete(self) -> bool:
        """The last message of every sample has come."""
        return self.started is not None and len(self.finished) == self._num_samples

    def next_message(self) -> generate_pb2.GenerateRequest:
        """What the next attempt sends: the delivered ids and the seed that they were made with."""
        self.finished.clear()
        if self.started is not None:
            self._params.seed = self.started.seed
        if self._has_output:
            # All of it came before the first token.
            self._params.ClearField("prompt_logprobs")
        else:
            self._prompt_pieces.clear()
        return self._message

    def take(self, event: generate_pb2.GenerateResponse) -> Delta | None:
        """Notes an event; returns what the caller is to get."""
        match event.WhichOneof("event"):
            case "started":
                self.started = started_of(event.started)
            case "prompt_logprobs":
                self._prompt_pieces.append(event.prompt_logprobs)
            case "delta":
                self._has_output = True
                if self._may_resume:
                    self._message.resume_output_ids.extend(event.delta.token_ids)
                return delta_of(event.delta)
            case "finished":
                self.finished[event.finished.sample_index] = finished_of(event.finished)
        return None

    def note_times(self, metadata: Iterable[tuple[str, str]] | None) -> None:
        """Keeps what a call's trailing metadata say of where the time went."""
        self.times = {key: value for key, value in metadata or () if key.startswith(_TIMES_PREFIX)}

    def check_complete(self) -> None:
        """Raises CallFailed if the stream has ended well and yet too early."""
        if not self.is_complete:
            raise failure("INTERNAL", "the server ended the stream without its last message")
