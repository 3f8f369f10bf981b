"""Between the client's dataclasses and the messages of protos.lockstep.v1.generate_pb2."""

import dataclasses
import reprlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lockstep.client.requests import Chat, GenerateRequest, SamplingParams
from lockstep.client.results import (
    Completion,
    Delta,
    Finished,
    FinishReason,
    ModelInfo,
    PromptLogprobs,
    Sample,
    ServerInfo,
    Started,
    TokenLogprobs,
    Usage,
)
from protos.lockstep.v1 import generate_pb2

_T = TypeVar("_T")
_FINISH_REASONS = {
    generate_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generate_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generate_pb2.FINISH_REASON_ABORTED: FinishReason.ABORTED,
}


def request_message(request: GenerateRequest) -> generate_pb2.GenerateRequest:
    """Raises TypeError or ValueError, naming the field, for what the message cannot hold."""
    message = generate_pb2.GenerateRequest()
    match request.prompt:
        case str(text):
            _set(message, "text", text, "prompt")
        case Chat(messages):
            message.chat.SetInParent()
            for turn in messages:
                added = message.chat.messages.add()
                _set(added, "role", turn.role)
                _set(added, "content", turn.content)
        case token_ids:
            message.token_ids.SetInParent()
            _set(message.token_ids, "ids", token_ids, "prompt")
    message.sampling_params.CopyFrom(_sampling_message(request.sampling))
    for name in ("request_id", "model", "resume_output_ids", "priority", "tenant"):
        _set(message, name, getattr(request, name))
    if request.use_prefix_cache is not None:
        _set(message, "use_prefix_cache", request.use_prefix_cache)
    return message


def _sampling_message(params: SamplingParams) -> generate_pb2.SamplingParams:
    message = generate_pb2.SamplingParams()
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value is None:
            continue
        if field.name != "choice":
            _set(message, field.name, value)
        elif value:
            _set(message.choice, "choices", value)
    return message


def _set(message: Any, name: str, value: object, shown_as: str = "") -> None:
    """Errors call the field `shown_as`, where that is not its name."""
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, str | bytes | int | float):
            setattr(message, name, value)
        else:
            getattr(message, name).extend(value)
    except (TypeError, ValueError) as error:
        # Not the error's own class: a UnicodeEncodeError is not made of words.
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{shown_as or name} is {reprlib.repr(value)}: {error}") from error


def started_of(message: generate_pb2.Started) -> Started:
    """The first event."""
    return _decoded(Started, message)


def delta_of(message: generate_pb2.Delta) -> Delta:
    """Further output."""
    return Delta(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_token_logprobs, message.logprobs)),
        sample_index=message.sample_index,
    )


def prompt_logprobs_of(pieces: Sequence[generate_pb2.PromptLogprobs]) -> PromptLogprobs | None:
    """All pieces joined; None without any."""
    if not pieces:
        return None
    return PromptLogprobs(
        first_position=pieces[0].first_position,
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(_token_logprobs(entry) for piece in pieces for entry in piece.logprobs),
    )


def finished_of(message: generate_pb2.Finished) -> Finished:
    """The last event of a sample."""
    matched = message.WhichOneof("matched_stop")
    return Finished(
        finish_reason=_FINISH_REASONS[message.finish_reason],
        usage=_decoded(Usage, message.usage),
        stop=message.stop if matched == "stop" else None,
        stop_token_id=message.stop_token_id if matched == "stop_token_id" else None,
        sample_index=message.sample_index,
    )


def completion_of(message: generate_pb2.GenerateUnaryResponse) -> Completion:
    """A whole answer."""
    samples = [(message.output, message.finished)]
    samples += [(sample.output, sample.finished) for sample in message.further_samples]
    pieces = [message.prompt_logprobs] if message.HasField("prompt_logprobs") else []
    return Completion(
        started=started_of(message.started),
        samples=tuple(_sample(output, finished) for output, finished in samples),
        prompt_logprobs=prompt_logprobs_of(pieces),
    )


def model_info_of(message: generate_pb2.GetModelInfoResponse) -> ModelInfo:
    """What the model can take."""
    return _decoded(ModelInfo, message)


def server_info_of(message: generate_pb2.GetServerInfoResponse) -> ServerInfo:
    """What the server is."""
    return _decoded(ServerInfo, message)


def _sample(output: generate_pb2.Delta, finished: generate_pb2.Finished) -> Sample:
    delta = delta_of(output)
    return Sample(delta.text, delta.token_ids, delta.logprobs, finished_of(finished))


def _token_logprobs(message: generate_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple(message.top_token_ids), tuple(message.top_logprobs))


def _decoded(kind: type[_T], message: Any) -> _T:
    """A dataclass whose fields are the message's by name; messages in it become dataclasses too."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hint, getattr(message, name)) for name, hint in hints.items()})


def _value(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_value(inner, item) for item in value)
    if typing.get_origin(hint) is Mapping:
        return dict(value)
    is_message = isinstance(hint, type) and dataclasses.is_dataclass(hint)
    return _decoded(hint, value) if is_message else value
