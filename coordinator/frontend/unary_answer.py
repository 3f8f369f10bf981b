"""A stream's events joined into one message."""

from collections.abc import Callable

from protos.lockstep.v1 import generate_pb2


class UnaryAnswer:
    """Gathers the events of one call with `num_samples` outputs."""

    def __init__(self, num_samples: int) -> None:
        self._started = generate_pb2.Started()
        self._texts: list[list[str]] = [[] for _ in range(num_samples)]
        self._prompt_pieces: list[generate_pb2.PromptLogprobs] = []
        self._samples = [generate_pb2.Sample() for _ in range(num_samples)]

    def add(self, event: generate_pb2.GenerateResponse) -> None:
        """Takes the next event."""
        match event.WhichOneof("event"):
            case "started":
                self._started = event.started
            case "prompt_logprobs":
                self._prompt_pieces.append(event.prompt_logprobs)
            case "delta":
                delta = event.delta
                output = self._samples[delta.sample_index].output
                self._texts[delta.sample_index].append(delta.text)
                output.token_ids.extend(delta.token_ids)
                output.logprobs.extend(delta.logprobs)
            case "finished":
                self._samples[event.finished.sample_index].finished.CopyFrom(event.finished)

    def response(
        self, cached_token_count: Callable[[int], int]
    ) -> generate_pb2.GenerateUnaryResponse:
        """The whole answer; `cached_token_count` of a sample may be known only at the end."""
        for index, (sample, texts) in enumerate(zip(self._samples, self._texts, strict=True)):
            sample.output.text = "".join(texts)
            sample.output.sample_index = index
            sample.finished.usage.cached_token_count = cached_token_count(index)
        first, *further = self._samples
        return generate_pb2.GenerateUnaryResponse(
            started=self._started,
            output=first.output,
            finished=first.finished,
            further_samples=further,
            prompt_logprobs=self._prompt(),
        )

    def _prompt(self) -> generate_pb2.PromptLogprobs | None:
        """All pieces joined; None without any."""
        if not self._prompt_pieces:
            return None
        whole = generate_pb2.PromptLogprobs(first_position=self._prompt_pieces[0].first_position)
        for piece in self._prompt_pieces:
            whole.token_ids.extend(piece.token_ids)
            whole.logprobs.extend(piece.logprobs)
        return whole
