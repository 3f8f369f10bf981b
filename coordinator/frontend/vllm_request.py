"""What a gateway asks of `VllmEngine` -> the same request of `lockstep.v1`. Pure functions."""

from collections.abc import Sequence
from typing import Any

from coordinator.errors import BadRequest
from coordinator.frontend.errors import RequestFailed
from coordinator.frontend.request_preparer import Dialect
from coordinator.sampling_limits import MAX_INT32
from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2

# Fields of ours that the protocol calls otherwise.
_NAMES = {
    "prompt": "input",
    "token_ids.ids": "tokenized.input_ids",
    "gbnf_grammar": "grammar",
}


def lockstep_request(request: vllm_engine_pb2.GenerateRequest) -> generate_pb2.GenerateRequest:
    """The same in our words. What is then checked is what `lockstep.v1` checks.

    Raises BadRequest for what has no counterpart.
    """
    if request.data_parallel_rank:
        rank = request.data_parallel_rank
        raise BadRequest("data_parallel_rank", rank, "unset or 0: there is one scheduler")
    asked = generate_pb2.GenerateRequest(
        request_id=request.request_id, sampling_params=_sampling_params(request.sampling_params)
    )
    match request.WhichOneof("input"):
        case "tokenized":
            _check_ids("tokenized.input_ids", request.tokenized.input_ids)
            asked.token_ids.ids.extend(request.tokenized.input_ids)
        case "text":
            asked.text = request.text
        case _:
            raise BadRequest("input", "unset", "one of tokenized and text")
    return asked


def dialect_of(request: vllm_engine_pb2.GenerateRequest) -> Dialect:
    """What the protocol means differently: the caller turns ids into text and trims stop texts."""
    return Dialect(
        clamps_max_tokens=True,
        skip_special_tokens=request.sampling_params.skip_special_tokens,
        ids_through_stop=True,
    )


def in_callers_words(error: BadRequest | RequestFailed) -> BadRequest | RequestFailed:
    """The same refusal, ours or the engine's, with the name that the field has in `VllmEngine`."""
    ours, bracket, index = error.field.partition("[")
    theirs = _NAMES.get(ours)
    if theirs is None:
        return error
    field = f"{theirs}{bracket}{index}"
    if isinstance(error, BadRequest):
        return BadRequest(field, error.value, error.limit, error.aspect)
    message = str(error).replace(ours, theirs, 1)
    return RequestFailed(error.status_code, message, error.retry_after_s, field)


def _sampling_params(params: vllm_engine_pb2.SamplingParams) -> generate_pb2.SamplingParams:
    """Numbers that cannot be unset are taken as they are; those with 0 for "off" are off then."""
    _refuse_unknown_to_us(params)
    for name in ("top_k", "min_tokens", "n"):
        _check_int32(name, getattr(params, name))
    _check_ids("stop_token_ids", params.stop_token_ids)
    asked = generate_pb2.SamplingParams(
        top_p=params.top_p or 1.0,
        top_k=params.top_k,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty or 1.0,
        min_tokens=params.min_tokens,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        n=params.n or 1,
        logit_bias=params.logit_bias,
        **_constraint(params),
    )
    for name in ("temperature", "seed", "logprobs"):
        if params.HasField(name):
            setattr(asked, name, getattr(params, name))
    if params.HasField("max_tokens"):
        asked.max_tokens = min(params.max_tokens, MAX_INT32)
    return asked


def _refuse_unknown_to_us(params: vllm_engine_pb2.SamplingParams) -> None:
    limits = {
        "prompt_logprobs": "unset: lockstep.v1.GenerateService gives them",
        "truncate_prompt_tokens": "unset: prompts are not cut",
        "structural_tag": "unset: json_schema, regex, grammar, json_object and choice are known",
    }
    for name, limit in limits.items():
        if params.HasField(name):
            raise BadRequest(name, getattr(params, name), limit)


def _constraint(params: vllm_engine_pb2.SamplingParams) -> dict[str, Any]:
    """The field of ours that says the same; empty without a constraint."""
    match params.WhichOneof("constraint"):
        case None:
            return {}
        case "grammar":
            return {"gbnf_grammar": params.grammar}
        case "choice":
            return {"choice": generate_pb2.ChoiceConstraint(choices=params.choice.choices)}
        case name:
            return {name: getattr(params, name)}


def _check_int32(field: str, value: int) -> None:
    """Ours are signed: a value beyond would not even fit the message."""
    if value > MAX_INT32:
        raise BadRequest(field, value, f"at most {MAX_INT32}")


def _check_ids(field: str, ids: Sequence[int]) -> None:
    if max(ids, default=0) > MAX_INT32:
        for index, value in enumerate(ids):
            _check_int32(f"{field}[{index}]", value)
